"""The command line. Only typer is imported here; each command imports what it needs, so that --help is instant.

Exit codes: 0 done, 1 the work failed, 2 the request is wrong.
"""

import sys
from typing import Annotated, Any

import typer

from cluster.analyze import app as analyze

app = typer.Typer(
    name="allograft",
    help="Which pretraining, moved how, helps which medical imaging task, and by how much.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(analyze, name="analyze")
Settings = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings, for instance cells.seeds=[0,1]")]
Tracking = Annotated[str | None, typer.Option(help="an MLflow address or the out of a study; default MLFLOW_TRACKING_URI")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        from base.paths import revision

        print(f"allograft {version('allograft')} ({revision()})")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="version and revision")] = False,
) -> None:
    """Read before any command; `main` looks for --debug itself, since errors arrive there."""


def _example(text: str) -> str:
    return f"Example: {text}"


@app.command(epilog=_example("allograft survey /data/unknown --out unknown.yaml"))
def survey(
    raw: Annotated[str, typer.Argument(help="a folder or URL of files that no card describes yet")],
    out: Annotated[str | None, typer.Option(help="file for the draft of its card; printed by default")] = None,
) -> None:
    """Describe an unknown folder: formats, sizes, tables, who the patients may be. And draft its card."""
    from base.paths import absolute
    from cluster.survey import show

    show(absolute(raw), out)


@app.command(epilog=_example("allograft pack nih-cxr14 /data/nih --out s3://bucket/shards/nih-cxr14"))
def pack(
    card: Annotated[str, typer.Argument(help="a card's name (allograft list datasets) or its YAML file")],
    raw: Annotated[str, typer.Argument(help="folder of raw files, or phantom:N for generated images")],
    out: Annotated[str, typer.Option(help="folder for the shards, path or URL")],
    max_side: Annotated[int | None, typer.Option(help="reduce larger images to this side in pixels; the card's rule by default")] = None,
    split_files: Annotated[str | None, typer.Option(help="your own split: a folder with train.txt, val.txt, test.txt, or a CSV")] = None,
    depth: Annotated[int | None, typer.Option(help="bits a pixel in the shards, 8 or 16; the card's by default")] = None,
) -> None:
    """Make checked, de-identified WebDataset shards from raw files."""
    from cluster.pack import pack_command
    from cluster.stopping import stoppable

    with stoppable():
        changes = {key: value for key, value in (("max_side", max_side), ("depth", depth)) if value is not None}
        pack_command(card, raw, out, changes, split_files)


@app.command(epilog=_example("allograft inspect s3://bucket/shards/montgomery --sheet montgomery.png"))
def inspect(
    url: Annotated[str, typer.Argument(help="folder of shards, path or URL")],
    sheet: Annotated[str | None, typer.Option(help="file of the contact sheet; default DATASET-sheet.png, here")] = None,
    seed: Annotated[int, typer.Option(help="another seed, other images")] = 0,
) -> None:
    """Print a manifest and write a contact sheet: random samples with their labels and masks, as PNG."""
    from base.paths import absolute
    from cluster.inspect import show

    show(absolute(url), sheet, seed)


@app.command(epilog=_example("allograft run studies/demo.yaml out=runs/demo cells.seeds=[0,1,2]"))
def run(
    study: Annotated[str, typer.Argument(help="a study file, or the name of one in studies/ or here")], settings: Settings = None
) -> None:
    """The main job: pack, pretrain, fine-tune, compare, register. Again = only what is missing."""
    from cluster.load import load_study

    _run(load_study(study, settings or []))


def _run(study: Any, *, typed: bool = False) -> None:
    from cluster.closing import closing
    from cluster.run import require_done
    from cluster.run import run as run_study
    from cluster.stopping import stoppable

    with stoppable():
        summary = run_study(study, typed=typed)
    closing(study, summary)
    require_done(summary)


@app.command(epilog=_example("allograft submit demo out=s3://bucket/demo tracking=http://mlflow:5000 --address http://127.0.0.1:8265"))
def submit(
    study: Annotated[str | None, typer.Argument(help="a study file, or the name of one in studies/ or here")] = None,
    settings: Settings = None,
    address: Annotated[str | None, typer.Option(help="of its dashboard, http://HOST:8265; default RAY_API_SERVER_ADDRESS")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="come back when it is sent")] = False,
    follow: Annotated[str | None, typer.Option(metavar="JOB", help="print the log of a job to its end; exit code: its driver's")] = None,
    stop: Annotated[str | None, typer.Option(metavar="JOB", help="end a job; the same study goes on later from what stands")] = None,
) -> None:
    """The study as a job of a Ray cluster. Its log is shown; the exit code is that of its driver. Ctrl-C leaves it running."""
    from cluster.submit import command

    raise typer.Exit(command(study, settings or [], address, detach=detach, followed=follow, stopped=stop))


@app.command(epilog=_example("allograft plan studies/real-mini.yaml preset=smoke --rate 2.5"))
def plan(
    study: Annotated[str, typer.Argument(help="a study file, or the name of one in studies/ or here")],
    settings: Settings = None,
    rate: Annotated[float | None, typer.Option(min=0, help="price of an hour of a GPU, or of a processor without GPUs")] = None,
    gpu: Annotated[str, typer.Option(help="which, where hours are told by operations (allograft explain)")] = "h100-sxm",
    wanted: Annotated[float | None, typer.Option(min=0, help="a difference of two sources: how many seeds declare it?")] = None,
) -> None:
    """What a study would do and take, what stands already, what is missing, what it could find. Starts nothing."""
    from cluster.load import load_study
    from cluster.outlook import outlook

    if not outlook(load_study(study, settings or []), rate=rate, gpu=gpu, wanted=wanted):
        raise typer.Exit(2)


@app.command(epilog=_example("allograft doctor studies/demo.yaml out=s3://bucket/demo tracking=http://mlflow:5000"))
def doctor(
    study: Annotated[
        str | None, typer.Argument(help="a study file, or the name of one in studies/ or here; what it needs is looked at")
    ] = None,
    settings: Settings = None,
    address: Annotated[str | None, typer.Option(help="a dashboard: whether allograft submit would reach it")] = None,
) -> None:
    """What is wrong with the cluster, or this machine, and how to mend it. Exit code 1: a study would run, but worse; 2: it would not."""
    from cluster.doctor import command

    raise typer.Exit(command(study, settings or [], address))


@app.command(epilog=_example("allograft pretrain simclr/small data.nih-cxr14.raw=/data/nih architecture=resnet18 out=runs/simclr"))
def pretrain(
    recipe: Annotated[str | None, typer.Argument(help="a recipe (allograft list recipes)")] = None,
    settings: Settings = None,
    resume: Annotated[str | None, typer.Option(help="folder of a run, OUT/pretrain/NAME-KEY: go on with it as it was begun")] = None,
) -> None:
    """One pretraining: a study without cells. Keys: data, out, architecture, start_from, seed, settings, resources, tracking."""
    if resume is not None:
        _resume(resume, [word for word in (recipe, *(settings or [])) if word])
        return
    from base.errors import RequestError
    from cluster.single import as_typed, pretrain_study

    if recipe is None:
        raise RequestError("no recipe", hint="allograft list recipes, or --resume RUN")
    with as_typed():
        _run(pretrain_study(recipe, settings or []), typed=True)


def _resume(run: str, words: list[str]) -> None:
    from base import storage
    from cluster.resume import resumed
    from cluster.standing import done

    study, config = resumed(run, words)
    if done(config.out):
        steps = storage.read_json(storage.join(config.out, "result.json"))["steps"]
        print(f"pretrain {config.name}: finished at step {steps}, nothing to do")
        return
    from cluster.closing import closing
    from cluster.run import go_on
    from cluster.stopping import stoppable

    with stoppable():
        summary = go_on(study, config)
    closing(study.model_copy(update={"cells": None}), summary)
    if study.cells is not None or len(study.pretrain) > 1:
        print(f"study     allograft run {study.out}/study.yaml   (what else it asks for)")


@app.command(epilog=_example("allograft explain simclr/paper optimizer.lr=2.4 --images 112120 --gpu a100-80 --gpus 8"))
def explain(
    recipe: Annotated[str, typer.Argument(help="a recipe (allograft list recipes)")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="its settings, for instance epochs=100")] = None,
    architecture: Annotated[str | None, typer.Option(help="resnet50 by default, vit_base_patch16_224 where only transformers fit")] = None,
    images: Annotated[int, typer.Option(help="of the corpus; ImageNet's by default")] = 1_281_167,
    channels: Annotated[int, typer.Option(min=1, help="of an image: 1 grey, 3 colour")] = 1,
    gpu: Annotated[str, typer.Option(help="its name, for instance h100-pcie, a100-40, rtx4090")] = "h100-sxm",
    gpus: Annotated[int, typer.Option(min=1, help="how many work together")] = 1,
) -> None:
    """A recipe in full, and what a run of it takes: steps, operations, memory, hours. Starts nothing, needs no GPU."""
    from cluster.explain import show

    show(recipe, settings or [], architecture, images, channels, gpu, gpus)


@app.command(epilog=_example("allograft finetune dxc14 data.nih-cxr14.raw=/data/nih source=random architecture=resnet18"))
def finetune(task: Annotated[str, typer.Argument(help="a task (allograft list tasks)")], settings: Settings = None) -> None:
    """One cell. Keys: data, out, source, architecture, strategy, fraction, resolution, seed, settings, resources, tracking."""
    from cluster.single import as_typed, finetune_study

    with as_typed():
        _run(finetune_study(task, settings or []), typed=True)


@app.command(epilog=_example("allograft report runs/demo"))
def report(
    outs: Annotated[list[str], typer.Argument(metavar="OUT [OTHER]", help="the out of a study, path or URL; with --compare of two")],
    compare: Annotated[bool, typer.Option("--compare", help="two studies beside each other, in OUT/report/compare-OTHER.html")] = False,
) -> None:
    """Write OUT/report/index.html and OUT/report/results.csv from what stands in OUT."""
    from base.errors import RequestError
    from base.paths import absolute
    from cluster.outs import require_study

    if len(outs) != 1 + compare:
        hint = "allograft report OUT, or allograft report --compare OUT OTHER"
        raise RequestError(f"{len(outs)} studies", where="report", hint=hint)
    if compare:
        one, two = (require_study(absolute(out)) for out in outs)
        from analysis.comparing import compare_studies

        print(f"report    {compare_studies(one, two)}")
        return
    url = require_study(absolute(outs[0]))  # before the imports: a wrong path is refused at once
    from analysis.evidence import gather
    from analysis.report import report as write

    evidence = gather(url)
    print(f"report    {write(url, evidence)}")
    print(evidence.answer())


@app.command(epilog=_example("allograft claims runs/claims"))
def claims(
    words: Annotated[list[str] | None, typer.Argument(metavar="[OUT]...", help="outs of studies; with --run settings, key=value")] = None,
    run: Annotated[bool, typer.Option("--run", help="run the study first: only what is missing")] = False,
    study: Annotated[str, typer.Option(help="with --run: a study file with claims, or the name of one in studies/ or here")] = "claims",
) -> None:
    """The ledger of claims: holds, fails, underpowered or not comparable, with intervals. Without anything: the ready claims."""
    from cluster.claims import show

    if not run:
        show(words or [])
        return
    from cluster.load import load_study

    loaded = load_study(study, words or [])
    _run(loaded)
    show([loaded.out])


@app.command(epilog=_example("allograft sync runs/demo"))
def sync(
    out: Annotated[str, typer.Argument(help="the out of a study, path or URL")],
    tracking: Annotated[str | None, typer.Option(help="another MLflow server than the study's")] = None,
) -> None:
    """Rebuild MLflow (runs, registry, champion) from storage."""
    from base.paths import absolute
    from cluster.run import sync as rebuild

    finished, champion = rebuild(absolute(out), tracking)
    print(f"{finished} finished runs in MLflow" + (f"; champion: {champion}" if champion else ""))


@app.command(epilog=_example("allograft pull demo@champion ./encoder --tracking runs/demo"))
def pull(
    name: Annotated[
        str, typer.Argument(metavar="NAME[@ALIAS]", help="a registered encoder; alias champion by default, a version by its number")
    ],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="an empty or new folder")],
    tracking: Tracking = None,
) -> None:
    """Fetch a registered encoder as a timm folder and check its hash."""
    from base.paths import absolute
    from cluster.registry import pull as fetch

    folder = absolute(folder)
    version = fetch(name, folder, _tracking(tracking))
    print(f"{name} version {version} in {folder}; load it with timm.create_model('local-dir:{folder}', pretrained=True)")


@app.command(epilog=_example('allograft promote demo 2 --reason "radiologists preferred its masks" --tracking runs/demo'))
def promote(
    name: Annotated[str, typer.Argument(help="a registered encoder")],
    version: Annotated[str, typer.Argument(help="its version that becomes the champion")],
    reason: Annotated[str, typer.Option(help="why, for those who come later: a tag of the version")],
    tracking: Tracking = None,
) -> None:
    """Make a version the champion by hand; later runs and syncs leave it, whatever the study's rule says."""
    from cluster.registry import promote as make_champion

    print(make_champion(name, version, reason, _tracking(tracking)))


def _tracking(given: str | None) -> str:
    """The address of the MLflow store that a command means."""
    import os

    from base.errors import RequestError
    from base.paths import absolute, is_url
    from cluster.mlflow_store import tracking_uri
    from cluster.outs import require_study

    where = given or os.environ.get("MLFLOW_TRACKING_URI")
    if not where:
        raise RequestError("no MLflow address", hint="--tracking runs/demo, or set MLFLOW_TRACKING_URI")
    return where if is_url(where) else tracking_uri(require_study(absolute(where)), "sqlite")


@app.command(epilog=_example("allograft weights moco-v2 --file moco_v2_800ep_pretrain.pth.tar"))
def weights(
    name: Annotated[str, typer.Argument(help="published weights (allograft list weights), timm:TAG, or with --architecture a new folder")],
    file: Annotated[str | None, typer.Option(help="their published file, where there is no network, or one's own weights")] = None,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="tensors that the file lacks stay random")] = False,
    architecture: Annotated[str | None, typer.Option(help="of one's own weights (allograft list architectures)")] = None,
    seen: Annotated[list[str] | None, typer.Option(help="a corpus that one's own weights have seen; again for each")] = None,
    labelled: Annotated[list[str] | None, typer.Option(help="a corpus that they have seen with its labels; again for each")] = None,
    licence: Annotated[str | None, typer.Option(help="terms of one's own weights")] = None,
    normalisation: Annotated[str | None, typer.Option(help="of their images: imagenet, neutral, ..; timm's unless given")] = None,
    image_size: Annotated[int | None, typer.Option("--image-size", min=1, help="side in pixels of their images; 224 unless given")] = None,
) -> None:
    """Fetch published weights, verify them and convert them once, so that studies start from zoo:NAME. With --architecture, convert one's
    own weights of a timm architecture into a folder from which studies start."""
    from base.errors import RequestError
    from base.paths import absolute
    from cluster.published import convert, obtain, show, source_of

    if architecture is None:
        if seen or labelled or licence or normalisation or image_size:
            raise RequestError("these are said of one's own weights", where=name, hint="give their --architecture, too")
        show(source_of(name), obtain(source_of(name), file, allow_partial))
        return
    if file is None or licence is None:
        raise RequestError("one's own weights need --file FILE and --licence LICENCE", where=name)
    convert(
        name,
        file,
        architecture=architecture,
        seen=seen or [],
        labelled=labelled or [],
        licence=licence,
        normalisation=normalisation,
        image_size=image_size or 224,
        allow_partial=allow_partial,
    )
    show(absolute(name), name)


@app.command(epilog=_example("allograft init chest"))
def init(name: Annotated[str, typer.Argument(help="of the study; written is NAME.yaml, here")]) -> None:
    """Write a study file in which each key is explained, to begin with. It runs as it stands, on generated images."""
    from cluster.init import write

    print(f"{write(name)}; now: allograft plan {name}.yaml")


@app.command("list", epilog=_example("allograft list tasks"))
def list_(
    what: Annotated[
        str | None, typer.Argument(help="methods, strategies, tasks, datasets, architectures, recipes, studies or weights")
    ] = None,
) -> None:
    """What there is."""
    from cluster.listing import show

    show(what)


@app.command(epilog=_example("allograft ui runs/demo --port 5000"))
def ui(
    out: Annotated[str, typer.Argument(help="the out of a study")] = ".",
    port: Annotated[int, typer.Option(help="port on loopback")] = 5000,
) -> None:
    """The MLflow UI of a study, on this machine only."""
    import os

    from base.errors import RequestError
    from base.paths import absolute
    from cluster.outs import require_study

    folder = require_study(absolute(out))
    if not os.path.exists(f"{folder}/mlflow.db"):
        raise RequestError("no embedded MLflow store here", where=folder, hint=f"allograft sync {out}")
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--default-artifact-root", f"{folder}/artifacts", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    print(f"starting http://127.0.0.1:{port}  (answers in some 20 s; Ctrl-C ends it)", flush=True)
    os.execv(sys.executable, command)


def main() -> None:
    """Entry point: errors become one line and an exit code; a traceback only with --debug, and for bugs."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    from base.errors import AllograftError

    try:
        app()
    except AllograftError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
