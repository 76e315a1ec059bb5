"""`allograft init NAME`: a study file in which each key is explained, to begin with.

path = write("chest")               # chest.yaml, here; never over another file

Keys that rest stand after a `#` without a blank, with a value that they may have; tests/test_cluster_init.py wakes them all.
"""

import re
from string import Template

from base import storage
from base.errors import RequestError
from base.paths import absolute, named, names

TEMPLATE = """\
# $study: what this study asks, in one sentence.
#
#   allograft plan $study.yaml     what it would do and take, and what is missing; starts nothing
#   allograft run $study.yaml      the study; again = only what is missing
#
# As it stands it runs in minutes, on generated images. For yours: their card and place under `data`, the card's name under `pretrain`,
# and a task of that dataset instead of `phantom-chest` under `cells` and `champion`. Keys after a # without a blank rest: remove the # to
# use them. Any key can also be set as a word of the command: allograft run $study.yaml cells.seeds=[0,1]
schema: 1                         # of this file
study: $study                     # also the name of its experiment and of its registered encoders in MLflow
out: runs/$study                  # where all of it goes: a folder, or a URL such as s3://bucket/$study
tracking: sqlite                  # MLflow's store, in out; or http://HOST:5000, which an out that is a URL needs

data:                             # by the name of a card (allograft list datasets), or by the file of your own, my.yaml (allograft survey)
  phantom-chest:
    raw: "phantom:1200"           # the folder of the raw files; here how many are generated
  #montgomery:
    #raw: /data/montgomery
    #split_files: /data/split     # train.txt, val.txt and test.txt that replace the card's split
  #nih-cxr14:
    #shards: /data/shards/nih     # instead of raw: a folder or URL with shards that stand already (allograft pack)

pretrain:                         # runs that make encoders; pretrain: [] where all encoders come from outside
  - name: simclr                  # later runs and cells call its encoder pretrain:simclr
    recipe: simclr/demo           # a method with its settings (allograft list recipes, allograft explain RECIPE)
    data: {phantom-chest: train}  # what it reads: a split of each dataset
    architecture: test_resnet     # allograft list architectures; this one is tiny. Left out: that of start_from
    start_from: random            # or pretrain:NAME, timm:TAG, zoo:NAME (allograft list weights), models:/NAME@ALIAS, run:ID, a folder
    seeds: [0]                    # a run for each
    #settings: {epochs: 30}       # keys of the recipe that this run sets otherwise
  #- name: next
    #recipe: supervised/smoke
    #data: {nih-cxr14: train}
    #labels: [Mass, Nodule]       # those that a supervised run learns, or a view of them in the card; left out: all
    #start_from: pretrain:simclr
    #replay: 0.3                  # share of its samples that comes from the data of the runs before it

cells:                            # the matrix: each of its combinations is fine-tuned and evaluated
  sources: [random, {name: random-b, source: random}, "pretrain:simclr"]  # as start_from; one under two names is a control
  strategies: [full, linear]      # how weights are moved (allograft list strategies); with options: {name: truncated, cut: layer2}
  tasks: [phantom-chest]          # allograft list tasks; TASK/smoke and TASK/paper are its other sizes
  fractions: [0.1]                # shares of the labelled training images; by task: {phantom-chest: [0.1, 1.0]}
  seeds: [0, 1, 2]                # repetitions of each; allograft plan says which difference they could show
  #architectures: [test_resnet]   # of sources without one, such as random; left out: those of the runs above
  #resolutions: [32]              # pixels, or by task as fractions; left out: the task's own
  #task_settings: {phantom-chest: {recipe.epochs: 10}}  # keys of a task's file that this study sets otherwise
  #tune: {lr: [3.0e-4, 1.0e-3], trials: 2}  # rates, the same for all, chosen on validation; left out: one rate
  #trial_seeds: [0]               # of the trials of every such search
  #keep: encoder                  # each cell's trained encoder is exported; left out: nothing
  #shuffled_labels: [random]      # control: sources whose cells are repeated with shuffled training labels
  #asked_by: claims               # only the cells that a claim compares; left out: matrix, all of them

champion:                         # whose encoder is $study@champion in MLflow: the best on the validation split of
  task: phantom-chest
  metric: auroc_mean

#claims:                          # sentences written before the run, which the report judges; ready ones by name (allograft claims)
  #- name: simclr-helps
    #sentence: These weights help.
    #about: encoders              # or methods, which takes three seeds of their pretrainings
    #comparison: {a: {source: simclr}, b: {source: random}}
    #expect: greater              # less, equivalent
    #margin: 0.02                 # of the metric
#analyses: [similarity, filters]  # also convergence, efficiency, transferability, accuracy: of the trained encoders, for the report
#leakage: exclude                 # pretraining images that match test images: train without them; left out: stop
#exposed: ranked                  # cells whose source has seen test images: ranked with the others; left out: apart

resources:                        # what a piece of work is given (docs/cluster.md)
  pretrain_workers: 2             # processes of a pretraining; [fewest, most]: as many as there is room for
  threads: 1                      # of each process
  #gpus_per_pretrain_worker: 1    # left out: 0, it trains on processors
  #loader_workers: 4              # processes that read and augment beside each of them; left out: none
  #cell_workers: 2                # cells at a time; left out: as many as the cluster holds
  #cell_ranks: 1                  # processes that train one cell together
  #gpus_per_cell: 0.25            # four cells on a GPU; measured: as many as fit; left out: 0
  #dtype: fp32                    # numbers in which cells compute; left out: bf16 with a GPU, else fp32

#presets: {quick: {cells.seeds: [0]}}  # settings under a name: allograft run $study.yaml preset=quick
#preset: quick                    # the one that applies
"""


def write(name: str) -> str:
    """Write `<name>.yaml` in the caller's directory.

    Returns:
        Its path.

    Raises:
        RequestError: the name cannot be a study's, is that of a ready one, or the file is there already.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) or name.endswith((".yaml", ".yml")):
        raise RequestError(f"'{name}' is no name of a study", hint="small letters, digits and . _ - after the first; without .yaml")
    if name in names("study"):
        raise RequestError(f"'{name}' is a ready study", where=str(named("study", name)), hint="another name")
    path = absolute(f"{name}.yaml")
    if not storage.create(path, "".join(_filled(line, name) for line in TEMPLATE.splitlines(keepends=True))):
        raise RequestError("this file is there already", where=path, hint="another name")
    return path


def _filled(line: str, name: str) -> str:
    """A line with the study's name in it; its comment stays in its column as long as there is room."""
    text, blanks, comment = line.partition("  # ")
    filled, column = Template(text.rstrip(" ")).substitute(study=name), len(text) if comment else 0
    return filled.ljust(column) + blanks + Template(comment).substitute(study=name)
