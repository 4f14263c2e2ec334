"""The main job: which training images made this diffusion model draw that picture.

``python -m dtrak.attribute --fused`` trains (or loads) a model, draws pictures (or takes queries),
streams D-TRAK features of training images and queries, applies the kernel-matrix inverse and writes
scores and a report. Every stage is kept in the output folder and reused, so a run that was
interrupted goes on.
"""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from ..runs.options import Options, check_options
from ..runs.ranks import by_itself, ranks, share
from .options import make_app, typed_options


def attribute(options: Options, console: Console) -> None:
    """Find the training images that made a diffusion model draw a picture.

    With no options: trains a small model on embedded digits, draws 16 pictures and explains them.
    """
    if options.run is not None:
        # light until here: torch comes first below, Diffusers only where something is to be done
        from .attribution import options_of_run

        options = options_of_run(options, typed_options())
    check_options(options)
    from ..pages.summary import print_findings, print_summary
    from ..runs.finished import find_finished

    share(options.shard)
    here = ranks()
    compare, options = options.compare, replace(options, compare=False)
    found = find_finished(options, console) if here.is_main and not compare else None
    if here.told("finished", found is not None or compare) and not here.is_main:
        return
    if found is not None:
        results, manifest = found
        once = {stage["name"]: stage["seconds"] for stage in manifest["stages"]}
        print_summary(results, manifest["reused"] | once, [], manifest["facts"])
        if options.noise_halves or options.look_alikes:
            from ..attribution import Attribution

            known = Attribution.open(results)
            print_findings(known.query_ids, known.scores, known.findings)
        return
    from .attribution import run_attribution, run_comparison

    if compare:
        # the others have ended
        with by_itself():
            run_comparison(options, console)
    else:
        run_attribution(options, console)


app, main = make_app("dtrak.attribute", Options, attribute, shares=True)

if __name__ == "__main__":
    main()
