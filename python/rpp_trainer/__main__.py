"""`rpp-train`, or `python -m rpp_trainer`."""

import os

# Two OpenMP threads that spin while they wait can make a tiny model 100 times slower on a busy machine. The OpenMP
# runtime reads this once, when torch is imported, so it must be set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys

try:
    from rpp_trainer.config import ConfigError, parse_config
except ModuleNotFoundError as error:
    sys.exit(f"rpp-train: {error}; it needs the extra `train`: pip install 'rpp-kernels[train]'")


def main(argv: list[str] | None = None) -> int:
    try:
        config = parse_config(sys.argv[1:] if argv is None else argv)
        from rpp_trainer.train import train  # torch and transformers: not for --help

        train(config)
    except ConfigError as error:
        print(f"rpp-train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rpp-train: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
