"""``python -m hf_sqf``: the same as ``hf-sqf``."""

from hf_sqf_command import main

if __name__ == "__main__":
    main()
