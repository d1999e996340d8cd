"""`vptm compare`."""

from __future__ import annotations

from typing import Any

import typer

from vptm.commands.options import takes
from vptm.settings import CompareSettings
from vptm.terminal import print_columns, say


@takes(CompareSettings.options_of())
def compare(**options: Any) -> None:
    """Train methods side by side.

    Every method is trained with its recipe on the same images for as many epochs, over several seeds; the epoch (and
    with --search the settings) is chosen on validation images, and each run is tested once. Prints a table and writes
    comparison.csv, comparison.json and comparison.png. Finished runs are kept, so the same command goes on where it was
    stopped, and refuses them where a setting changed; a run that fails is reported and the others go on.

    \b
    Example:
      vptm compare --methods vptm,vpt-deep,spt,linear --seeds 3
    """
    settings = CompareSettings(**options)
    from vptm.commands.comparison import compare as run
    from vptm.commands.comparison_table import table
    from vptm.training.devices import device_of
    from vptm.training.run_folder import located

    device_of(settings.device)
    names = [name.strip() for name in settings.methods.split(",") if name.strip()]
    arguments = ["--model", located("model", settings.model), "--device", settings.device]
    arguments += ["--background", settings.background, "--precision", settings.precision]
    arguments += ["--compile"] if settings.compile else []
    arguments += ["--cuda-graph"] if settings.cuda_graph else []
    arguments += [] if settings.value_range is None else [f"--value-range={settings.value_range}"]
    results = run(
        names,
        settings.out,
        data=located("data", settings.data),
        seeds=settings.seeds,
        epochs=settings.epochs,
        shots=settings.shots,
        arguments=arguments,
        search=settings.search,
        jobs=settings.jobs,
        report=say,
    )
    print_columns(table(results))
    print(f"comparison folder  {settings.out} (comparison.csv, comparison.json, comparison.png)")
    failed = [f"{result.name} {run}: {reason}" for result in results for run, reason in result.failures.items()]
    if failed:
        say(f"vptm: {len(failed)} runs failed, the same command tries them again: {'; '.join(failed)}")
        raise typer.Exit(1)
