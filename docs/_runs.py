"""Keeps the runs behind a report beside it, without checkpoints: ``python docs/_runs.py NAME FOLDER…``.

``docs/reports/NAME/runs.tar.xz`` holds configuration, log and evaluation of each run. Unpacked, they can be reported anew, alone or beside
runs of one's own: ``tar -xf docs/reports/NAME/runs.tar.xz -C elsewhere``, then ``k24 report elsewhere results/…``.
"""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

KEPT = ("config.yaml", "eval.json", "metrics.jsonl")


def pack(folders: Sequence[Path]) -> bytes:
    """An archive of the runs below some folders, by ``<algo>-<method>/seed<k>`` below a folder for each task. The same bytes again.

    Args:
        folders: Each of one task, such as ``results/vmas/navigation``.
    """
    found = io.BytesIO()
    with tarfile.open(fileobj=found, mode="w:xz", format=tarfile.USTAR_FORMAT, preset=9) as archive:
        for folder in sorted(folders):
            for run in sorted(path.parent for path in folder.rglob("eval.json")):
                for name in KEPT:
                    data = (run / name).read_bytes()
                    member = tarfile.TarInfo(str(Path(folder.name, run.relative_to(folder), name)))
                    member.size, member.mode = len(data), 0o644
                    archive.addfile(member, io.BytesIO(data))
    return found.getvalue()


if __name__ == "__main__":
    name, *folders = sys.argv[1:]
    (Path(__file__).parent / "reports" / name / "runs.tar.xz").write_bytes(pack([Path(folder) for folder in folders]))
