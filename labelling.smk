# Candidate mattes of a folder of cases, one job for each case; what is missing is done, what fails is listed at the end.
#   snakemake -s labelling.smk --keep-going --cores 2 --config cases=my_cases output=labelling
# On a cluster, with the plugin snakemake-executor-plugin-slurm installed and the folders on a disk that all machines see:
#   snakemake -s labelling.smk --keep-going --executor slurm --jobs 100 --config cases=my_cases output=labelling
# Settings other than the defaults: begin the labelling with `medmatting label ... --setting NAME VALUE` and one case.
import sys
from pathlib import Path

from medmatting.labelling import find_sources

CASES, OUTPUT = Path(config["cases"]).absolute(), Path(config["output"]).absolute()
NAMES = [source.name for source in find_sources(CASES)]


rule all:
    input:
        [OUTPUT / "done" / name for name in NAMES],


# The stamp says that all candidates of a case were computed; files of the case that are newer than it make it out of date.
rule label:
    input:
        lambda wildcards: sorted(path for path in (CASES / wildcards.case).rglob("*") if path.is_file()),
    output:
        touch(OUTPUT / "done" / "{case}"),
    params:
        python=sys.executable,
        cases=CASES,
        output=OUTPUT,
    threads: int(config.get("threads", 1))
    resources:
        mem_mb=int(config.get("mem_mb", 4096)),
        runtime=int(config.get("minutes", 60)),
    shell:
        "NUMBA_NUM_THREADS={threads} {params.python:q} -m medmatting label {params.cases:q} -o {params.output:q} --case {wildcards.case:q}"
