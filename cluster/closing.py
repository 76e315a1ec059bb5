"""What a run says last: where its report, MLflow and encoders are, and the study's answer."""

from base.paths import is_url
from cluster.run import Summary
from cluster.standing import encoders
from cluster.study import Study


def closing(study: Study, summary: Summary) -> None:
    """Say it."""
    embedded = study.tracking == "sqlite" and not is_url(study.out)
    where = study.out if embedded else study.tracking
    print(f"report    {summary.report}")
    print(f"MLflow    {f'allograft ui {study.out}' if embedded else study.tracking}")
    if summary.champion:
        print(f"encoder   allograft pull {study.study}@champion DIR --tracking {where}   ({summary.champion})")
    elif summary.versions:
        if study.champion:
            why = f"no encoder has cells of {study.champion.task} that count: own-source, exposed and incomplete settings do not"
            print(f"champion  none: {why}; allograft promote {study.study} VERSION --reason WHY --tracking {where}")
        print(f"encoders  {', '.join(f'{study.study}/{version} is {name}' for name, version in summary.versions.items())}")
    elif study.champion and not study.pretrain:
        print("champion  none: only pretrainings of the study are registered, and it has none")
    if study.cells is None:
        for folder, health in encoders(study.out):
            print(f"folder    {folder}   ({health})")
    else:
        print(f"cells     {summary.cells_kept} kept, {summary.cells_new} new, {summary.cells_failed} failed")
    if summary.restarts or summary.deaths:
        print(f"survived  {summary.restarts} restart(s) of a pretraining, {summary.deaths} death(s) of a cell worker")
    if study.cells is not None:
        print(summary.answer)
