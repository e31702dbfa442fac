# Workflow of the reproduction, read from nbs/experiments/manifest.yml: one rule for each item.
# `medmatting reproduce` calls it. On a cluster, after `pip install snakemake-executor-plugin-slurm`:
#   snakemake --executor slurm --jobs 20 --directory build --config profile=full threads=8
import sys

from medmatting import manifest, run

ROOT = manifest.find_root(workflow.basedir)
PROFILE = config.get("profile", "quick")
ITEMS = [item for item in manifest.read_manifest(ROOT).values() if PROFILE in item.parameters and all(map(run.is_present, item.inputs))]
CALL = "import sys; from medmatting.run import job; sys.exit(job(*sys.argv[1:]))"


rule all:
    input:
        [run.stamp(item, PROFILE, ROOT) for item in ITEMS],


for number, item in enumerate(ITEMS):

    # The stamp is named by the fingerprint of everything that decides the result, so no time stamp matters.
    rule:
        name:
            item.id
        output:
            touch(run.stamp(item, PROFILE, ROOT)),
        params:
            python=sys.executable,
            call=CALL,
            item=item.id,
            profile=PROFILE,
            root=ROOT,
        # The order of the manifest, where cores are scarce.
        priority: len(ITEMS) - number
        threads: int(config.get("threads", 1))
        resources:
            mem_mb=int(1024 * item.resources["memory_gb"]),
            runtime=item.resources["minutes"][PROFILE],
        shell:
            "{params.python:q} -c {params.call:q} {params.item} {params.profile} {params.root:q} {threads}"
