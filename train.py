"""Fine-tune a mixture of LoRA experts on a frozen base model.

    python train.py                                     the shipped base and questions: minutes on a laptop
    python train.py --base DIR --data FILE --eval FILE --out DIR
    python train.py --out DIR --resume                  continue after Ctrl-C or a crash

One training step is in minidoctor/step.py, the run around it in minidoctor/training/run.py.
"""

import argparse

from minidoctor.cli.flags import add_flags
from minidoctor.cli.main import run
from minidoctor.config import AdapterConfig, TrainConfig
from minidoctor.training.run import start_or_resume, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, TrainConfig)
    add_flags(parser, AdapterConfig)
    config, adapter, state = start_or_resume(vars(parser.parse_args()))
    train(config, adapter, state)


if __name__ == "__main__":
    run(main)
