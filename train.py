"""Fine-tune a mixture of LoRA experts on a frozen base model.

    python train.py                                     the shipped base and questions: minutes on a laptop
    python train.py --base DIR --data FILE --eval FILE --out DIR
    python train.py --out DIR --resume                  continue after Ctrl-C or a crash
    torchrun --nproc-per-node 8 train.py ...            the same run on several GPUs or processes

One training step is in minidoctor/step.py, the run around it in minidoctor/training/run.py.
"""

import argparse
from pathlib import Path

from minidoctor.cli.flags import add_flags
from minidoctor.cli.main import run
from minidoctor.cli.processes import start_processes
from minidoctor.config import AdapterConfig, TrainConfig
from minidoctor.training.run import train
from minidoctor.training.start import lock_directory, start_or_resume


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, TrainConfig)
    add_flags(parser, AdapterConfig)
    flags = vars(parser.parse_args())
    processes = start_processes(flags.get("device", TrainConfig.device))
    state = start_or_resume(flags, processes)  # rejected flags create no directory
    with lock_directory(Path(state.config.out), processes):
        train(start_or_resume(flags, processes), processes)


if __name__ == "__main__":
    run(main)
