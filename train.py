"""Fine-tune a mixture of LoRA experts on a frozen base model.

    python train.py                                     the shipped base and questions: minutes on a laptop
    python train.py --base DIR --data FILE --eval FILE --out DIR
    python train.py --out DIR --resume                  continue after Ctrl-C or a crash

One training step is in minidoctor/step.py, the run around it in minidoctor/training/run.py.
"""

import argparse
from pathlib import Path

from minidoctor.cli.flags import add_flags
from minidoctor.cli.main import run
from minidoctor.config import AdapterConfig, TrainConfig
from minidoctor.training.run import train
from minidoctor.training.start import lock_directory, start_or_resume


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, TrainConfig)
    add_flags(parser, AdapterConfig)
    flags = vars(parser.parse_args())
    out = start_or_resume(flags).config.out  # rejected flags create no directory
    with lock_directory(Path(out)):
        train(start_or_resume(flags))


if __name__ == "__main__":
    run(main)
