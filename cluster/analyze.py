"""`allograft analyze`: the studies' figures from saved encoders and from finished studies. Like cluster.cli it imports only typer."""

from typing import Annotated

import typer

app = typer.Typer(
    help="Representations and convergence: CSV tables and PNG figures in a folder, and a short table here.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog="Example: allograft analyze similarity runs/demo/pretrain/simclr-1a2b random --data runs/demo/shards/phantom-chest",
)
ENCODER = "an export's folder (or one that holds export/ or encoder/), timm:TAG, zoo:NAME, or random:SEED"
ACCURACY = "CSV with the columns source, accuracy and, to hold several networks against each other, architecture"


@app.command(epilog="Example: allograft analyze similarity before after --data s3://bucket/shards/nih-cxr14 --images 2000")
def similarity(
    encoders: Annotated[list[str], typer.Argument(metavar="A B | OUT", help=f"two encoders, each {ENCODER}; or the out of one study")],
    data: Annotated[str, typer.Option(help="folder of packed shards whose images are shown, path or URL")],
    trained: Annotated[
        list[str] | None, typer.Option(help="A and B after training, in this order: then each is compared with its own beginning")
    ] = None,
    split: Annotated[str, typer.Option(help="whose images are shown")] = "val",
    images: Annotated[int, typer.Option(min=2, help="at most so many, the same whoever asks")] = 1000,
    size: Annotated[int | None, typer.Option(min=16, help="side in pixels; default: what the first encoder was made for")] = None,
    cuts: Annotated[str | None, typer.Option(help="names of cut points, with commas between; default: all")] = None,
    measure: Annotated[str, typer.Option(help="drawn: svcca, cca, pwcca_x, pwcca_y, cka, cka_debiased, procrustes; CSV: all")] = "svcca",
    spatial: Annotated[str, typer.Option(help="maps: fold (positions are rows), pool, interpolate, dft")] = "fold",
    energy: Annotated[str, typer.Option(help="SVCCA keeps 99 % of s2 or of s")] = "s2",
    out: Annotated[str, typer.Option(help="folder for tables and figures")] = "similarity",
) -> None:
    """Layer by layer, how alike two encoders see the same images, beside what unrelated ones would score."""
    from cluster.compare import similarity as run

    run(encoders, data, trained or [], split, images, size, cuts.split(",") if cuts else None, measure, spatial, energy, out)


@app.command(epilog="Example: allograft analyze filters timm:resnet18.a1_in1k runs/demo/cells/1a2b3c/encoder --out filters")
def filters(
    encoder: Annotated[str, typer.Argument(metavar="A", help=ENCODER)],
    after: Annotated[str | None, typer.Argument(metavar="B", help="the same encoder after training")] = None,
    out: Annotated[str, typer.Option(help="folder for table and figures")] = "filters",
) -> None:
    """First-layer filters: a gallery, how much each is a Gabor function, and with B how far training moved each."""
    from cluster.compare import filters as run

    run(encoder, after, out)


@app.command(epilog="Example: allograft analyze convergence runs/demo --threshold 0.8")
def convergence(
    outs: Annotated[list[str], typer.Argument(metavar="OUT...", help="the outs of one or more studies, paths or URLs")],
    threshold: Annotated[
        float | None, typer.Option(help="of the validation metric; default: what the typical run of every source reaches")
    ] = None,
    by: Annotated[str, typer.Option(help="epochs, steps or seconds")] = "epochs",
    base: Annotated[str | None, typer.Option(help="the source that speed-ups are over; default: that of random weights")] = None,
    accuracy: Annotated[str | None, typer.Option(help=f"{ACCURACY}: does it foretell the task's metric (Spearman)")] = None,
    out: Annotated[str, typer.Option(help="folder for tables and figures")] = "convergence",
) -> None:
    """How soon each source's runs reach a threshold, speed-up over random weights, and what each transfused depth saves."""
    from cluster.convergence import convergence as run

    run(outs, threshold, by, base, accuracy, out)


@app.command(epilog="Example: allograft analyze efficiency runs/demo")
def efficiency(
    outs: Annotated[list[str], typer.Argument(metavar="OUT...", help="the outs of one or more studies, paths or URLs")],
    threads: Annotated[int, typer.Option(min=1, help="of a processor; a GPU is used where there is one")] = 1,
    out: Annotated[str, typer.Option(help="folder for the table")] = "efficiency",
) -> None:
    """What every trained network costs beside the whole one: parameters, operations, latency for 1 and 32 images on this machine."""
    from cluster.costs import efficiency as run

    run(outs, threads, out)


@app.command(epilog="Example: allograft analyze study runs/demo --what convergence,filters")
def study(
    out: Annotated[str, typer.Argument(metavar="OUT", help="the out of a study, path or URL")],
    what: Annotated[
        str, typer.Option(help="of similarity, filters, convergence, efficiency, transferability, accuracy; with commas between")
    ] = "similarity,filters,convergence,efficiency,transferability",
    accuracy: Annotated[str | None, typer.Option(help=f"{ACCURACY}; kept as OUT/accuracy.csv, and its analysis is added to --what")] = None,
) -> None:
    """What a study's `analyses` would compute of its cells, into OUT/analyses, where `allograft report OUT` reads it."""
    from cluster.analyses import of_study

    of_study(out, what.split(","), accuracy)
