"""The model card: README.md of a folder with a compressed model, from what lies in the folder."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers.modelcard import TASK_MAPPING
from transformers.models.auto import modeling_auto

from ..report.accounts import megabytes
from ..report.writing import whole_file
from ..runtime.sqf_config import SQFConfig
from ..runtime.sqf_modules import SUFFIX
from ..runtime.sqf_size import entry_bytes, file_bytes, header_of

MARKER = "<!-- Written by hf_sqf, which renews it. Remove this line to keep your changes. -->"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
_CARRIED = ("language", "license", "license_name", "license_link", "pipeline_tag", "datasets")
_METRIC_TYPES = {"word_error_rate": "wer"}  # as the Hub names metrics
_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def write_card(folder: str | Path, repo_id: str | None = None, base_card: ModelCard | None = None) -> Path | None:
    """Write README.md into a folder that holds a compressed model, unless someone else's stands there.

    Args:
        folder: with config.json and safetensors.
        repo_id: where it will be found on the Hub; by default the folder's name stands for it.
        base_card: the original's card, whose language, licence and task are carried over; by default that of
            ``base_model``, if it is in the local cache.

    Returns:
        The card's path, or None where a card stood that :func:`ours` does not know.
    """
    folder = Path(folder)
    path = folder / "README.md"
    if path.exists() and not ours(path.read_text(encoding="utf-8")):
        return None
    whole_file(path, str(make_card(folder, repo_id, base_card)))
    return path


def ours(text: str) -> bool:
    """Return whether a card was written by this module and left as it was."""
    return MARKER in text


def make_card(folder: Path, repo_id: str | None = None, base_card: ModelCard | None = None) -> ModelCard:
    """Return the card of a folder that holds a compressed model. See :func:`write_card`."""
    model_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = SQFConfig.from_dict(dict(model_config["quantization_config"]))
    architecture = (model_config.get("architectures") or ["model"])[0]
    if base_card is None and config.base_model:
        base_card = base_card_of(config.base_model, local_files_only=True)
    name = (repo_id or folder.resolve().name).split("/")[-1]
    data = _metadata(config, architecture, name, base_card)
    facts = _facts(folder, config, str(model_config.get("dtype") or "float32"))
    made_with = {k: v for k, v in config.to_dict().items() if k not in ("coverage", "fidelity", "base_model")}
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    content = template.render(
        card_data=data.to_yaml(),
        marker=MARKER,
        model_name=name,
        repo_id=repo_id or folder.resolve().name,
        base_model=config.base_model,
        architecture=architecture,
        auto_class=auto_class(architecture),
        fidelity=config.fidelity,
        made_with=json.dumps(made_with, indent=2),
        versions={"hf_sqf": package_version(), "transformers": transformers.__version__, "torch": _version("torch")},
        **facts,
    )
    return ModelCard(content)


def base_card_of(name: str, local_files_only: bool = False) -> ModelCard | None:
    """Return the card of a model on the Hub, or None where it has none or cannot be had."""
    try:
        return ModelCard.load(hf_hub_download(name, "README.md", local_files_only=local_files_only))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        return None


def auto_class(architecture: str) -> str:
    """Return the Auto class that loads an architecture: LlamaForCausalLM -> AutoModelForCausalLM."""
    return known_auto_class(architecture) or "AutoModel"


@cache
def known_auto_class(architecture: str) -> str | None:
    """Return the Auto class in whose table an architecture stands, or None.

    Where it stands in several, the one that is called like it counts: BertForMaskedLM is in the table of
    AutoModelForPreTraining, too.
    """
    _, found, task = architecture.partition("For")
    if architecture.endswith(("LMHeadModel", "LMHead")):
        found, task = "For", "CausalLM"
    elif task == "ConditionalGeneration":
        task = "Seq2SeqLM"
    like_it = f"AutoModelFor{task}" if found else "AutoModel"
    classes = sorted(name for name in dir(modeling_auto) if name.startswith("AutoModel"))
    for name in [like_it, *(name for name in classes if name != like_it)]:
        if name in classes and architecture in _architectures(name):
            return name
    return None


def _architectures(auto_class: str) -> set[str]:
    """Return what an Auto class can load, without importing any of it."""
    table = getattr(getattr(modeling_auto, auto_class), "_model_mapping", None)
    names = [] if table is None else table._model_mapping.values()  # type of config -> one name or several
    return {name for entry in names for name in ((entry,) if isinstance(entry, str) else entry)}


def package_version() -> str:
    """Return the version of hf_sqf that runs here."""
    return str(sys.modules[__name__.partition(".")[0]].__version__)  # the package that this module is in


def _version(distribution: str) -> str:
    return importlib.metadata.version(distribution)


def _metadata(config: SQFConfig, architecture: str, name: str, base_card: ModelCard | None) -> ModelCardData:
    carried = {key: base_card.data.get(key) for key in _CARRIED} if base_card is not None else {}
    carried = {key: value for key, value in carried.items() if value is not None}
    tags = [] if base_card is None else list(base_card.data.get("tags") or [])
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=carried.pop("pipeline_tag", None) or _task(architecture),
        base_model=config.base_model,
        base_model_relation="quantized" if config.base_model else None,
        tags=list(dict.fromkeys(["sqf", *tags])),
        model_name=name,
        eval_results=list(_results(config, _task(architecture))) or None,
        **carried,
    )


def _task(architecture: str) -> str:
    tasks: Any = TASK_MAPPING  # inferred as dictionaries of objects
    for task, mapping in tasks.items():
        for names in mapping.values():
            if architecture in ((names,) if isinstance(names, str) else names):
                return task
    return "feature-extraction"


def _results(config: SQFConfig, task: str) -> Iterator[EvalResult]:
    found = config.fidelity or {}
    names = {
        "value": {"kl": "KL divergence from the original (nats)", "cosine": "cosine with the original"},
        "agreement": {"kl": "same most likely prediction as the original"},
        "perplexity": {"kl": "perplexity"},
        "accuracy": {"kl": "accuracy"},
        "word_error_rate": {"kl": "word error rate"},
    }
    for field, of_metric in names.items():
        metric = str(found.get("metric"))
        if field in found and metric in of_metric:
            yield EvalResult(
                task_type=task,
                dataset_type="text",
                dataset_name=str(found.get("name")),
                metric_type=_METRIC_TYPES.get(field, metric if field == "value" else field),
                metric_name=of_metric[metric],
                metric_value=found[field],
            )


def _facts(folder: Path, config: SQFConfig, dtype: str) -> dict[str, Any]:
    after = file_bytes(folder)
    packed = 0  # as size_report counts, which would decode every weight to say more
    for file in folder.glob("*.safetensors"):
        for name, entry in header_of(file).items():
            if name.endswith(SUFFIX):
                start, end = entry["data_offsets"]
                packed += end - start + entry_bytes(name, entry)
    coverage = config.coverage or {}
    total, compressed = coverage.get("parameters", 0), coverage.get("compressed", 0)
    size = _DTYPE_BYTES.get(dtype, 4)
    return {
        "dtype": dtype,
        "bits_before": 8 * size,
        "size_before": megabytes(total * size),
        "size_after": megabytes(after),
        "ratio": f"{total * size / after:.1f}" if after else "?",
        "bits": f"{8 * packed / compressed:.3f}" if compressed else "?",
        "coverage": f"{100 * compressed / total:.2f} % of {total:,}" if total else "?",
        "dense": coverage.get("dense") or {},
    }
