"""`rana info`."""

from rana_kernels.backends import info
from rana_kernels.cli.options import AsJson, app, print_json


@app.command("info")
def show_info(as_json: AsJson = False) -> None:
    """Say which backend serves each op, with what instruction set, threads and versions."""
    found = info.report()
    if as_json:
        print_json(found.to_dict())
    else:
        print(found)
