"""What the scripts share: a run and its data, and bad input as one sentence."""

import contextlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402


@contextlib.contextmanager
def exit_on_bad_input(script):
    """Within it, bad input ends the script in one sentence and status 2."""
    try:
        yield
    except afire.InputError as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{script}: cannot use {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def load_run(folder):
    """-> models as of afire.load_models, options, Radiographs without tests on trained patients."""
    models, run, trained_on = afire.load_models(folder)
    if run is None:
        raise afire.InputError(f"{folder} is an encoder alone: name the folder of a run, as "
                               "`afire.py pretrain` leaves it")
    data = afire.load_radiographs(run.data, run.img_size, labels=run.labels, levels=run.levels,
                                  all_normal=not run.labels)
    missing = set(run.images).difference(data.hashes)
    if missing:
        raise afire.InputError(f"{len(missing)} of the {len(run.images)} images that {folder} was "
                               f"pre-trained on are not in {run.data}: start this script in the "
                               "folder where the run was started")
    data.test = afire.without_pretrained(data, np.isin(data.hashes, trained_on))
    return models, run, data
