"""What the README shows a reader to type, run as it stands there."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import module_of
from tests.hub.conftest import hub, run  # noqa: F401 (fixtures)
from tests.hub.server import HubServer, Repo

README = Path(__file__).parent.parent / "README.md"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_there_are_blocks():
    assert len(python_blocks()) >= 3


def test_blocks_run(hub: HubServer, run, minilm: Path, tmp_path: Path):  # noqa: F811
    """All blocks in order, as one session, with a Hub on loopback that has the packaged copy of the model."""
    repo = hub.repos[MINILM] = Repo()
    files = [path for path in minilm.rglob("*") if path.is_file()]
    repo.commit("main", {path.relative_to(minilm).as_posix(): path.read_bytes() for path in files})
    run("\n".join(python_blocks()))
    assert (tmp_path / "small" / "model.safetensors").exists()
    assert "model.safetensors" in hub.files("me/minilm-sqf")


def test_the_first_screen_compresses_fine_tunes_and_shares():
    first = README.read_text(encoding="utf-8").partition("\n## ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", first, flags=re.DOTALL | re.MULTILINE)
    assert [language for language, _ in blocks] == ["python"] * 3 + [""]
    for says, (_, block) in zip(("SQFConfig(bits=", "SQFCallback()", "push_to_hub", "make demo"), blocks, strict=True):
        assert says in block
    assert first.count("](recipes/results/size_quality.svg)") == 1


def test_links_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (README.parent / link).exists(), link


@pytest.mark.parametrize("kept", ["minilm_bits.txt", "results/calibrated_lm.txt", "results/peers.txt"])
def test_figures_are_those_of_the_recipe(kept: str):
    table = (README.parent / "recipes" / kept).read_text(encoding="utf-8")
    assert table in README.read_text(encoding="utf-8"), f"{kept} was measured again: copy it here"


def test_lines_of_digits_are_those_of_the_recipe():
    kept = (README.parent / "recipes" / "results" / "digits.txt").read_text(encoding="utf-8").splitlines()
    quoted = [line for line in README.read_text(encoding="utf-8").splitlines() if re.match(r"(resnet|vit) ", line)]
    assert len(quoted) == 26 and set(quoted) <= set(kept), "digits.txt was measured again: copy it here"
    found = {(row[0], row[1], round(float(row[2]))): row for row in map(str.split, quoted)}
    dense = {model: float(row[4]) for (model, structure, _), row in found.items() if structure == "dense"}
    tuned = {key: float(row[8]) for key, row in found.items() if key[1] != "dense"}
    short = {key for key, accuracy in tuned.items() if accuracy < dense[key[0]] - 0.01}
    assert short == {("vit", "vq", 1)}  # as the text above the table says
    for model in dense:
        one = {structure: accuracy for (of, structure, bits), accuracy in tuned.items() if (of, bits) == (model, 1)}
        assert max(one.values()) == one["grid"] > one["svd"]


def test_commands_are_make_targets():
    """Every `make x` in the text has its rule."""
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ((?:demo|test|check|clean|install)[a-z-]*)", README.read_text(encoding="utf-8")))
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in named)


def test_the_picture_is_drawn_from_the_kept_results():
    """By its description; and what it shows are the tables' figures."""
    recipe = module_of("recipes/size_quality.py")
    picture = ElementTree.fromstring(recipe.PICTURE.read_text(encoding="utf-8"))
    words = {element.text for element in picture.iter() if element.text}
    assert recipe.source() in words, "the results were measured again: python recipes/size_quality.py"
    table = recipe.CALIBRATED.read_text(encoding="utf-8")
    ours, gptq, rounding = recipe.calibrated(table)
    for series in (ours, gptq, rounding):
        for bits, kl in zip(series.sizes, series.values, strict=True):
            assert re.search(rf"{bits:.3f}[ \d.]* {kl:.4f} ", table)
        assert series.name in words
    assert len(ours.sizes) == table.count("hf_sqf, grid  ")


def test_the_picture_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    recipe = module_of("recipes/size_quality.py")
    monkeypatch.setattr(recipe, "PICTURE", tmp_path / "again.svg")
    recipe.main()
    assert recipe.source() in (tmp_path / "again.svg").read_text(encoding="utf-8")


KEPT = README.parent / "recipes" / "results"
AT_3 = "tokens at 3 bits, "
FIGURES = [  # what a sentence says -> the file that is kept, and what stands there
    ("SmolLM2-135M takes 544 s on two cores", "calibration_time.txt", r"30 +134\.5 +\S+ +544 "),
    ("and 0.9 GB beside what Python", "calibration_time.txt", r"30 .* 888 +538"),
    ("takes 0.16 bits more at 2.05", "trellis_lm.txt", r"at 2\.047 bits, scalar needs 0\.159"),
    ("and 0.19 more at 2.5,", "trellis_lm.txt", r"at 2\.496 bits, scalar needs 0\.194"),
    ("of MiniLM's blocks 0.19 more at 2.0", "trellis_encoder_linears.txt", r"at 1\.995 bits, scalar needs 0\.188"),
    (
        "0.23 at 2.5 and 3.0",
        "trellis_encoder_linears.txt",
        r"at 2\.494 .* needs 0\.232(.*\n)+at 2\.994 .* needs 0\.231",
    ),
    (
        "it takes 0.10, 0.11 and 0.18 more",
        "trellis_encoder.txt",
        r"0\.100 bits(.*\n)+.*0\.111 bits(.*\n)+.*0\.185 bits",
    ),
    ("54.9 MB in place of 538 MB", "calibrated_lm.txt", r"with embeddings +3\.257 +54\.9 "),
    (
        "0.352, 0.166 and 0.081",
        "calibrated_lm_one_pass.txt",
        r"2\.047 .*0\.3520(.*\n)+.*2\.496 .*0\.1658(.*\n)+.*0\.0812 ",
    ),
    ("0.491, 0.266 and 0.104", "calibrated_lm_one_pass.txt", r"0\.4912 (.*\n)+.*0\.2662 (.*\n)+.*0\.1038 "),
    ("is 0.38 to 21.7 times what the metric says", "calibrated_encoder.txt", r"says of them: 0\.38 .*, 21\.68 "),
    (
        "a mean cosine of 0.982, 0.992 and 0.996",
        "calibrated_encoder.txt",
        r" 2 +1\.996 +5\.79 +0\.9821 (.*\n)+? +2\.5 +2\.498 +\S+ +0\.9917 (.*\n)+? +3 +2\.996 +\S+ +0\.9961 ",
    ),
    ("2.8 billion parameters take 13 minutes", "scale.txt", r"2,797,501,440 +\S+ +767\.8 "),
    ("1.3 GB above the imports", "scale.txt", r"2,797,501,440 .* 1266 "),
    (
        "3.5 times as fast as float32 on one thread and 4.0 times on two, 2.45 and 2.27 times as fast as bfloat16",
        "speed.txt",
        rf"{AT_3}threads: 1\n(.*\n)*? *auto f.* 3\.52 .* 2\.45 (.*\n)*?.*: 2\n(.*\n)*? *auto f.* 3\.97 .* 2\.27 ",
    ),
    (
        "at 4 bits it is 2.0 and 1.9 times as fast as bfloat16",
        "speed.txt",
        r"at 4 bits, threads: 1\n(.*\n)*? *auto f.* 2\.04 +2\.04\n(.*\n)*?.*: 2\n(.*\n)*? *auto f.* 1\.91 +1\.91\n",
    ),
    (
        "decoding was 3.1 and 3.4 times as fast as float32, 2.8 and 2.6 times as fast as bfloat16",
        "speed_zen4.txt",
        rf"{AT_3}threads: 1\n(.*\n)*? *auto f.* 3\.11 .* 2\.80 (.*\n)*?.*: 2\n(.*\n)*? *auto f.* 3\.39 .* 2\.61 ",
    ),
    (
        "decoding is 2.8 and 2.4 times as fast as float32, 2.6 and 2.5 times",
        "speed_amx.txt",
        rf"{AT_3}threads: 1\n(.*\n)*? *auto f.* 2\.84 .* 2\.65 (.*\n)*?.*: 2\n(.*\n)*? *auto f.* 2\.38 .* 2\.54 ",
    ),
    (
        "is 2.2 and 2.6 times as fast as float32, but 1.8 and 1.4 times as fast as bfloat16",
        "speed_avx2.txt",
        rf"{AT_3}threads: 1\n(.*\n)*? *auto f.* 2\.22 .* 1\.84 (.*\n)*?.*: 2\n(.*\n)*? *auto f.* 2\.58 .* 1\.40 ",
    ),
    (
        "a process holds 0.56 bytes each with `int4`, 1.00",
        "speed.txt",
        r"running at 3(.*\n)*? *int8 .* 1\.00 (.*\n) *int4 .* 0\.56 ",
    ),
    ("with `stream` 1.01 times the file", "speed.txt", r"running at 3(.*\n)*? *stream .* 0\.38 +1\.01 "),
    (
        "Loading takes 0.98 to 1.15 times",
        "speed.txt",
        r"running at 3(.*\n)*? *int8 .* 0\.98 .*\n.* 0\.98 .*\n.* 1\.15 ",
    ),
    ("and four tokens together take 2.5 times", "speed.txt", r"running at 3(.*\n)*? *int4 .* 2\.48\n"),
    (
        "2.42 times as fast as dense float32 at batch 64, where a model of hf_sqf is 2.63,",
        "peers.txt",
        r"all weights, bfloat16 .* 2\.63\n(.*\n)*? *bitsandbytes NF4, bfloat16 .* 2\.42\n",
    ),
    (
        "2.31 at batch 1, where it is 3.27;",
        "peers.txt",
        r"all weights, bfloat16 .* 3\.27 (.*\n)*? *bitsandbytes NF4, bfloat16 .* 2\.31 ",
    ),
    (
        "in float32 both are as fast at batch 64 (2.05 and 2.06)",
        "peers.txt",
        r"hf_sqf, 4 bits, all weights .* 2\.06\n(.*\n)*? *bitsandbytes NF4 .* 2\.05\n",
    ),
    (
        "from a KL divergence of 0.268 to 0.232 in 150 steps of 1,024 tokens",
        "distill_lm_light.json",
        r'"kl": \[\s+0\.2675\d+,\s+0\.2317\d+\s+\],\s+"steps": 150,\s+"seconds_per_step": 23\.04(.*\n)+.*"step": 1024',
    ),
    (
        "in 600 steps, with no codes to keep and no budget, go from 0.262 to 0.196",
        "distill_lm_dense.json",
        r'"kl": \[\s+0\.2620\d+,\s+0\.1958\d+\s+\],\s+"steps": 600',
    ),
    (
        "all but the embeddings, go from 0.0179 to 0.0171 in 300 steps",
        "distill_encoder_dense.json",
        r'"distance": \[\s+0\.01789\d+,\s+0\.0171\d+\s+\],\s+"steps": 300',
    ),
    ("the file grew by 0.03 %", "distill_lm_light.json", r'"bytes": \[\s+140537576,\s+140578152'),
    (
        "from 1 - cosine of 0.0174 to 0.0170 in 150 steps of 32 paragraphs, 20 minutes of processor time",
        "distill_encoder_light.json",
        r'"distance": \[\s+0\.0174\d+,\s+0\.0170\d+\s+\],\s+"steps": 150,\s+"processor_\w+": 1199(.*\n)+.*"step": 32',
    ),
    ("a step takes 0.69 times as long", "training_cost.txt", r"light +\S+ +0\.69 +\S+ +0\.89"),
    ("and 1.19 times with codes", "training_cost.txt", r"latent +\S+ +1\.19 +\S+ +1\.32"),
]


@pytest.mark.parametrize(("says", "file", "stands"), FIGURES, ids=[says for says, _, _ in FIGURES])
def test_figures_in_sentences_are_kept(says: str, file: str, stands: str):
    assert says in " ".join(README.read_text(encoding="utf-8").split()), "say it anew here, too"
    assert re.search(stands, (KEPT / file).read_text(encoding="utf-8")), f"{file} was measured again"


def test_peers_are_slower_where_the_text_says_so():
    assert "With AVX2 alone every one of them is slower than hf_sqf at both (" in README.read_text(encoding="utf-8")
    rows = json.loads((KEPT / "peers_avx2.json").read_text(encoding="utf-8"))["rows"]
    speeds = {row["side"]: (row["tokens/s at 1"], row["tokens/s at 64"]) for row in rows if "dense" not in row["side"]}
    ours = [speeds.pop(side) for side in list(speeds) if side.startswith("hf_sqf")]
    assert len(ours) == 3 and len(speeds) == 6
    for slowest, *others in zip(map(min, zip(*ours, strict=True)), *speeds.values(), strict=True):
        assert slowest > max(others)


def test_peers_but_one_are_slower_with_avx512_too():
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert "NF4 in bfloat16 is 2.42 times" in text and "The others are slower at both." in text
    rows = json.loads((KEPT / "peers.json").read_text(encoding="utf-8"))["rows"]
    speeds = {row["side"]: (row["tokens/s at 1"], row["tokens/s at 64"]) for row in rows if "tokens/s at 64" in row}
    ours = [found for side, found in speeds.items() if side.startswith("hf_sqf") and side.count("bits, all weights")]
    others = [found for side, found in speeds.items() if side.startswith(("optimum", "HQQ", "torchao", "GPTQModel"))]
    assert len(ours) == 4 and len(others) == 5
    for slowest, *found in zip(map(min, zip(*ours, strict=True)), *others, strict=True):
        assert slowest > max(found)


def layer_ratios(file: str, numbers: int) -> list[tuple[float, str]]:
    """Return how fast layers are beside dense ones with int4, which auto is, and where: the slowest first.

    There are so many numbers of rows.
    """
    rows = re.findall(r"^ *(\d+ x \d+ +\d+) +\S+ +(\S+)", (KEPT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) == 2 * 5 * numbers
    return sorted((float(ratio), " ".join(point.split())) for point, ratio in rows)


@pytest.mark.parametrize(
    ("says", "file", "numbers", "least", "most", "places"),
    [
        (
            "there 1.56 to 21 times as fast as dense ones with `auto`, at 23 numbers of rows",
            "speed.txt",
            23,
            1.56,
            21,
            0,
        ),
        (
            "layers are 0.90 to 5.6 times as fast as dense ones, at 15 numbers of rows",
            "speed_amx.txt",
            15,
            0.90,
            5.6,
            1,
        ),
        ("layers are 0.94 to 10 times as fast as dense ones, at 23 numbers of rows", "speed_avx2.txt", 23, 0.94, 10, 0),
    ],
)
def test_layers_are_as_fast_as_the_text_says(
    says: str, file: str, numbers: int, least: float, most: float, places: int
):
    assert says in " ".join(README.read_text(encoding="utf-8").split())
    found = layer_ratios(file, numbers)
    assert (found[0][0], round(found[-1][0], places)) == (least, most)
