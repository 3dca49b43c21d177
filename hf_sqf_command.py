"""The command line ``hf-sqf``: what can be typed. What the commands do stands in ``hf_sqf.cli``.

A module of its own, outside the package: importing the package imports torch, for which ``--help`` should not wait.
"""

from __future__ import annotations

import errno
import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

ANYWHERE = ("--debug", "--quiet")
# click's, which newer typers bring along and older ones import
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


@dataclass(frozen=True)
class Asked:
    """What holds for every command."""

    debug: bool = False
    quiet: bool = False


class Commands(TyperGroup):
    """The commands; tells errors in a sentence, and takes the options of all commands anywhere on the line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 (click's or typer's Context)
        """Move :data:`ANYWHERE` to the front, unless they stand behind ``--``."""
        end = args.index("--") if "--" in args else len(args)
        moved = [arg for arg in args[:end] if arg in ANYWHERE]
        return super().parse_args(ctx, moved + [a for i, a in enumerate(args) if i >= end or a not in ANYWHERE])

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401
        """Run the command: exit code 1 after an error, 2 after one of usage, 130 after Ctrl-C."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("hf-sqf: interrupted", err=True)
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort, _UsageError):
            raise
        except Exception as error:
            piped = isinstance(error, OSError) and error.errno == errno.EPIPE  # hf-sqf ... | head
            if piped or ctx.params.get("debug"):
                raise
            typer.echo(f"hf-sqf: {sentence(error)}", err=True)
            raise typer.Exit(1) from None


def sentence(error: Exception) -> str:
    """Return an error as one line; what it is called, too, unless it is of a kind that explains itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    says = lines[0] if lines else ""
    if isinstance(error, (ValueError, OSError, ImportError, LookupError)) and says:
        return says
    return f"{type(error).__name__}: {says} (--debug shows where)"


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a model of transformers, or its id on the Hub.")]
Against = Annotated[str, typer.Option(metavar="MODEL", help="The original: folder or id on the Hub.")]
Texts = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        metavar="FILE|HUB_ID",
        help="Texts: a file, one a line, or .jsonl with a field text; or a data set on the Hub. "
        "Without: prose that comes with Python.",
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN",
        help="Field of a .jsonl or of a data set that holds classes: adds accuracies. "
        "Of speech, the field of what is said: adds the share of words that are wrong.",
    ),
]
Inputs = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN",
        help="With --labels: field of texts, or of paths of pictures or of .wav.",
        show_default="text, image or audio",
    ),
]
Split = Annotated[str | None, typer.Option(show_default="validation", help="Of a data set on the Hub.")]
Samples = Annotated[int | None, typer.Option(min=1, show_default="all", help="Texts to measure on, evenly spread.")]
Context = Annotated[int | None, typer.Option(min=2, show_default="128", help="Tokens of each text.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", exists=True, file_okay=False, help="A compressed model.")]
FolderOrRepo = Annotated[
    str, typer.Argument(metavar="FOLDER_OR_REPO", help="Compressed model: folder or id on the Hub.")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the model in OUT.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-sqf {version('hf-sqf')}")
        raise typer.Exit


@app.callback()
def everywhere(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors and JSON.")] = False,
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Store a model's weights as sparse, quantized matrix factors.

    \b
    hf-sqf compress sentence-transformers/all-MiniLM-L6-v2 small --bits 5
    hf-sqf inspect small
    hf-sqf evaluate small --against sentence-transformers/all-MiniLM-L6-v2

    --debug and --quiet may stand anywhere on the line.

    Exit codes: 1 after an error, 2 after one of usage, 130 after Ctrl-C.
    """
    ctx.obj = Asked(debug, quiet)
    if quiet:
        from hf_sqf.cli.showing import silence

        silence()


@contextmanager
def usage() -> Iterator[None]:
    """Make what an SQFConfig refuses an error of usage."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def say(ctx: typer.Context, text: object) -> None:
    """Print, unless asked to be quiet."""
    if not ctx.obj.quiet:
        typer.echo(text)


def give(figures: object) -> None:
    """Print as JSON, whose standard has no NaN."""
    typer.echo(json.dumps(figures, indent=1, allow_nan=False))


@app.command()
def compress(
    ctx: typer.Context,
    model: Model,
    out: Out,
    bits: Annotated[
        float | None,
        typer.Option(show_default="4", help="Bits a weight, on average over all compressed ones, everything counted."),
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Size of the saved weights instead of bits, such as 48MB.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|HUB_ID|self",
            help="Calibration data: a file of texts, a data set on the Hub, or text that the model writes itself. "
            "Without, weights are approximated without regard to what goes through them.",
        ),
    ] = None,
    structure: Annotated[
        str | None,
        typer.Option(
            show_default="auto",
            help="auto, grid, svd, sparse_pca, vq, pgd or a sum such as svd+grid. grid is much the fastest.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE.yaml",
            help="Options as a file, such as {bits: 2.5, structure: grid}. Those on the line count more.",
        ),
    ] = None,
    trellis: Annotated[
        int | None, typer.Option(show_default="64", help="States of dependent quantization, 4 to 256.")
    ] = None,
    no_trellis: Annotated[
        bool, typer.Option("--no-trellis", help="Round every code by itself: faster, larger at the same error.")
    ] = False,
    include_embeddings: Annotated[
        bool | None,
        typer.Option(show_default=False, help="Compress embeddings and language model heads, as by default."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(show_default="32", help="Inputs of the calibration data, of each kind of text.")
    ] = None,
    context: Annotated[int | None, typer.Option(show_default="512", help="Tokens of an input, at most.")] = None,
    seed: Annotated[int | None, typer.Option(show_default="0", help="Of what is drawn at random.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(show_default="auto", help="Load the weights in this type; auto: as they are saved."),
    ] = None,
    auto_class: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS", show_default="told from the model's config", help="AutoModelForCausalLM or such."
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compress a model and save it, with its tokenizer and a model card.

    OUT is written whole or not at all, also if you press Ctrl-C.

    \b
    hf-sqf compress sentence-transformers/all-MiniLM-L6-v2 small --bits 5
    hf-sqf compress org/model small --target-size 48MB --dataset texts.txt
    hf-sqf compress ./model ./small --bits 2.5 --structure grid --no-trellis --force
    hf-sqf compress org/model small --recipe options.yaml
    """
    if bits is not None and target_size is not None:
        raise typer.BadParameter("give --bits or --target-size, not both")
    if trellis is not None and no_trellis:
        raise typer.BadParameter("give --trellis or --no-trellis, not both")
    from hf_sqf.cli.compressing import compress as run_compress
    from hf_sqf.cli.compressing import sqf_config

    given = {"bits": bits, "target_size": target_size, "dataset": dataset, "structure": structure, "trellis": trellis}
    given |= {"include_embeddings": include_embeddings, "samples": samples, "context": context, "seed": seed}
    given |= {"dtype": dtype, "auto_class": auto_class}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if no_trellis:
        options["trellis"] = None
    if recipe is not None:
        from hf_sqf.cli.recipe import read_options

        options = read_options(recipe, options)
    if "dataset" not in options and ("samples" in options or "context" in options):
        raise typer.BadParameter("--samples and --context are of calibration data: give --dataset, too")
    loading = {name: options.pop(name) for name in ("dtype", "auto_class") if name in options}
    with usage():
        config = sqf_config(**options)
    made = run_compress(model, out, config, force=force, **loading)
    if made is not None:
        give(asdict(made)) if as_json else say(ctx, made)


@app.command()
def inspect(
    ctx: typer.Context,
    folder: FolderOrRepo,
    weights: Annotated[bool, typer.Option("--weights", help="Every weight instead of every layer.")] = False,
    as_json: Json = False,
) -> None:
    """Say where the bytes of a compressed model go, layer by layer.

    \b
    hf-sqf inspect small
    hf-sqf inspect small --json | jq .bits_per_weight
    """
    from hf_sqf.cli.showing import console, inspected, show_inspected
    from hf_sqf.hub.fetching import folder_of

    found = folder_of(folder)
    figures = inspected(found)
    give(figures) if as_json else show_inspected(console(ctx.obj.quiet), found, figures, weights)


@app.command()
def report(
    ctx: typer.Context,
    folder: FolderOrRepo,
    out: Annotated[Path, typer.Argument(metavar="OUT.html", help="File to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.html.")] = False,
    as_json: Json = False,
) -> None:
    """Write one HTML page about a compressed model, for a browser.

    \b
    hf-sqf report small small.html

    It shows sizes, coverage, bits per weight of each layer, how often each code occurs, and what evaluate --record
    measured.
    """
    from hf_sqf.cli.folders import refuse_file
    from hf_sqf.cli.showing import inspected
    from hf_sqf.hub.fetching import folder_of
    from hf_sqf.report.accounts import count_codes
    from hf_sqf.report.page import page
    from hf_sqf.report.writing import whole_file

    refuse_file(out, ".html", force)
    counts: Counter[int] = Counter()
    figures = inspected(folder_of(folder), partial(count_codes, counts))
    whole_file(out, page(Path(folder).resolve().name, figures, counts))
    give({"page": str(out)}) if as_json else say(ctx, f"{out}: a page about {folder}")


@app.command()
def evaluate(
    ctx: typer.Context,
    model: FolderOrRepo,
    against: Against,
    dataset: Texts = None,
    samples: Samples = None,
    context: Context = None,
    labels: Labels = None,
    inputs: Inputs = None,
    split: Split = None,
    record: Annotated[bool, typer.Option("--record", help="Write the result into config.json and the card.")] = False,
    as_json: Json = False,
) -> None:
    """Measure how far a compressed model lies from its original.

    KL divergence, perplexity and equal predictions of models that predict; cosine of outputs of others. With --labels,
    the accuracy of a classifier, too, or the word errors of a model that writes down speech.

    \b
    hf-sqf evaluate small --against org/model --dataset held-out.txt
    hf-sqf evaluate small --against org/classifier --dataset held-out.jsonl --labels label --inputs sentence
    hf-sqf evaluate small --against openai/whisper-tiny --dataset clips.jsonl --labels text
    hf-sqf evaluate small --against ./model --context 512 --record
    """
    data = Data(dataset, samples, context, labels, inputs, split)
    _measure(ctx, [model], against, data, as_json, record=record)


@app.command()
def compare(
    ctx: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODELS...", help="Compressed models: folders or ids.")],
    against: Against,
    dataset: Texts = None,
    samples: Samples = None,
    context: Context = None,
    labels: Labels = None,
    inputs: Inputs = None,
    split: Split = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png|svg", help="Draw size against quality (takes matplotlib).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure several compressed models of one original, and show them in a table.

    \b
    hf-sqf compare small-4 small-3 small-2 --against org/model --dataset held-out.txt --plot sizes.svg
    """
    data = Data(dataset, samples, context, labels, inputs, split)
    _measure(ctx, models, against, data, as_json, plot=plot)


@dataclass(frozen=True)
class Data:
    """What models are measured on, as it was typed; None: not given."""

    dataset: str | None
    samples: int | None
    context: int | None
    labels: str | None
    inputs: str | None
    split: str | None

    def __post_init__(self) -> None:
        for name in ("samples", "labels", "split"):
            if getattr(self, name) is not None and self.dataset is None:
                raise typer.BadParameter(f"--{name} is of --dataset, which is missing")
        if self.inputs is not None and self.labels is None:
            raise typer.BadParameter("--inputs go with --labels, which is missing")


def _measure(
    ctx: typer.Context,
    models: list[str],
    against: str,
    data: Data,
    as_json: bool,
    *,
    record: bool = False,
    plot: Path | None = None,
) -> None:
    from hf_sqf.cli import measuring, showing
    from hf_sqf.cli.labelled import Labelled
    from hf_sqf.report import plots

    if plot is not None:
        plots.refuse_plot(plot)
    split = data.split or measuring.SPLIT
    labelled = None if data.labels is None else Labelled(str(data.dataset), data.labels, data.inputs, split)
    texts = data.dataset if labelled is None else None
    rows = measuring.evaluate(models, against, texts, data.samples, data.context, record, labelled, split)
    if plot is not None:
        plots.save(plots.size_against_quality([plots.models(rows)], rows[0]["metric"]), plot)
    give(rows) if as_json else showing.show_rows(showing.console(ctx.obj.quiet), rows)


@app.command()
def verify(ctx: typer.Context, folder: FolderOrRepo, revision: Revision = None, as_json: Json = False) -> None:
    """Look through a compressed model without executing any of it; exit code 1 if something differs.

    Compares the code that travels with it with the installed package's, by SHA-256, and checks every compressed weight
    by its CRC. Names pickles and foreign code.

    \b
    hf-sqf verify small
    hf-sqf verify org/model-sqf --revision 1a2b3c4
    """
    from hf_sqf.hub import verify as run_verify

    faults = run_verify(folder, revision)
    if as_json:
        give([asdict(fault) for fault in faults])
    else:
        typer.echo("\n".join(map(str, faults)), nl=bool(faults))
    if faults:
        raise typer.Exit(1)
    if not as_json:
        say(ctx, f"{folder}: all is as it was saved, and the code is the package's own")


@app.command()
def export(
    ctx: typer.Context,
    folder: FolderOrRepo,
    out: Out,
    gguf_ready: Annotated[
        bool, typer.Option("--gguf-ready", help="float16, which llama.cpp's convert_hf_to_gguf.py takes best.")
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(show_default="as it was saved")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write an ordinary checkpoint with the decoded weights, for programs that do not know the format.

    \b
    hf-sqf export small dense
    hf-sqf export org/model-sqf dense --gguf-ready
    """
    if gguf_ready and dtype not in (None, "float16"):
        raise typer.BadParameter(f"--gguf-ready means float16, and --dtype says {dtype}")
    from hf_sqf.cli.folders import refuse_overwriting, whole_folder
    from hf_sqf.hub import export as run_export

    refuse_overwriting(out, force, folder)
    with whole_folder(out) as part:
        run_export(folder, part, dtype="float16" if gguf_ready else dtype)
    give({"folder": str(out)}) if as_json else say(ctx, f"{out}: an ordinary checkpoint of {folder}")


@app.command()
def push(
    ctx: typer.Context,
    folder: Folder,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name; created where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Push even what the recorded fidelity refuses.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; created where there is none.")] = None,
    as_json: Json = False,
) -> None:
    """Push a compressed model to the Hub, once its files have been looked through.

    A model whose recorded fidelity (hf-sqf evaluate --record) is outside of the limits in its config is refused. Log in
    first, with hf auth login.

    \b
    hf-sqf push small me/model-sqf --private
    """
    from hf_sqf.hub import push as run_push

    done = run_push(folder, repo, force=force, private=private or None, revision=revision)
    give({"url": done.commit_url, "commit": done.oid}) if as_json else say(ctx, done.commit_url)


@app.command()
def run(
    ctx: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", exists=True, dir_okay=False)],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="In place of what the recipe says.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Make and measure all models again.")] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe: compress a model in several ways, measure each, write tables and cards.

    A run that was interrupted goes on where it stopped; what was made of the same settings stays.

    \b
    model: org/model
    out: build/model               # the results: NAME/ for each model, table.md, table.json, cards/
    dataset: texts.txt             # calibration; may be left out
    compressions:
      - {bits: 4}                  # all that SQFConfig has, and name
      - {name: small, bits: 2.5, structure: grid}
      - {from: small, train: {steps: 100}}  # its factors, held to the original's predictions
    evaluations:
      - {dataset: held-out.txt, context: 512}

    \b
    hf-sqf run recipes/language_model.yaml --set model=./model --set out=build/mine
    """
    chosen = {}
    for setting in settings or []:
        key, found, value = setting.partition("=")
        if not found:
            raise typer.BadParameter(f"--set takes KEY=VALUE, got {setting}")
        chosen[key] = value
    from hf_sqf.cli import recipe as recipes
    from hf_sqf.cli import showing

    read = recipes.read_recipe(recipe, chosen)
    rows = recipes.run(read, force)
    give(rows) if as_json else showing.show_rows(showing.console(ctx.obj.quiet), rows)
    if not as_json:
        say(ctx, f"{read.out}: models, cards, table.md, table.json")


def main() -> None:
    """Run the command line; what the script ``hf-sqf`` and ``python -m hf_sqf`` call."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left half-written then, either
    app(prog_name="hf-sqf")
