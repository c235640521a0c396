"""Both demos in one, m2mKD on digits and CLIPTrans on emoji: demo_m2mkd.py and demo_cliptrans.py.

The runs of both share the cores, so that none is idle while the first demo's last run finishes.
Each table is printed as soon as its runs are finished. Run it again to resume an interrupted demo.

    python tools/demo.py --workdir runs/demo
"""

import argparse
import dataclasses
import time

import demo_cliptrans
import demo_m2mkd

from common_jax.commands.sweep.jobs import Job, demo_parser, parse_demo, run_all
from common_jax.signals import ends_quietly

DEMOS = {"m2mkd": demo_m2mkd, "cliptrans": demo_cliptrans}


@ends_quietly
def main() -> None:
    flags = parse_demo(demo_parser(__doc__, workdir="runs/demo", seeds=1))
    start, done, jobs = time.time(), set(), plan(flags)

    def after(name: str) -> None:
        demo, _, run = name.partition("/")
        done.add(name)
        if demo == "m2mkd":
            own = {x.partition("/")[2] for x in done if x.startswith("m2mkd/")}
            demo_m2mkd.show_progress(flags.workdir / demo, run, own)
        if all(x in done for x in jobs if x.startswith(f"{demo}/")):
            DEMOS[demo].finish(part(flags, demo), start)

    run_all(jobs, flags.workdir, at_a_time=flags.jobs, after_each=after)


def plan(flags: argparse.Namespace) -> dict[str, Job]:
    """The jobs of both demos, named DEMO/JOB."""
    jobs = {}
    for demo, module in DEMOS.items():
        for name, job in module.plan(part(flags, demo)).items():
            needs = None if job.needs is None else f"{demo}/{job.needs}"
            jobs[f"{demo}/{name}"] = dataclasses.replace(job, needs=needs)
    return jobs


def part(flags: argparse.Namespace, demo: str) -> argparse.Namespace:
    """The flags of one of DEMOS, with its own folder."""
    return argparse.Namespace(**{**vars(flags), "workdir": flags.workdir / demo})


if __name__ == "__main__":
    main()
