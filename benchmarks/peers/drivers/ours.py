"""Slipstream, measured as the other drivers measure their libraries: one JSON line on standard output.

    python ours.py ppo --env ALE/Pong-v5 --seconds 60 --set schedule=concurrent --set net.torso=nature_cnn
"""

import argparse

from slipstream.run.config import override
from slipstream.run.presets import configure
from slipstream.run.training import Training


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("algo")
    parser.add_argument("--env", default="ALE/Pong-v5")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warmup", type=float, default=10)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    args = parser.parse_args()
    from meter import Meter

    changes = dict(item.split("=", 1) for item in args.settings)
    config = override(configure(args.algo, args.env, changes), {"total_steps": 10**9, "stop_at_return": None})
    meter = Meter("slipstream", args.algo, args.seconds, args.warmup, settings={"env": args.env, **changes})
    training = Training(config)
    try:
        for report in training:
            if meter.tick(report.steps):
                break
        meter.finish()
    finally:
        training.close()


if __name__ == "__main__":
    main()
