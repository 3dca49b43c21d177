"""What the system says of this process's memory."""

from pathlib import Path

SMAPS = Path("/proc/self/smaps")


def resident(path: Path) -> int:
    """Return the kilobytes of a mapped file that are in memory."""
    total, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0] and ":" not in line.split(maxsplit=1)[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total
