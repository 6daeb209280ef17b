"""Build a part of ModelSet500 on CIFAR-100 in limited time, such as on a borrowed GPU, and pack what is finished:

python scripts/build_part.py BUILD OUT --seconds 480 --device cuda

OUT starts as a copy of data/modelset500-cifar100, and gets what BUILD adds: bring it back as data/modelset500-cifar100.
Networks that are packed already are not trained. Run it again with the same folders to go on.
"""
import argparse
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKED = ROOT/"data/modelset500-cifar100"


def build_for(seconds: int, command: list[str]) -> bool:
    "Run a build; interrupt it when the time is over, which keeps its checkpoints. Returns whether it came to its end"
    with subprocess.Popen(command) as process:
        try: code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            return False
    if code: raise SystemExit(f"the build ended with exit code {code}: nothing was packed")
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="folder of the build")
    parser.add_argument("out", type=Path, help="folder for packed networks")
    parser.add_argument("--packed", type=Path, default=PACKED, help="what is packed already")
    parser.add_argument("--images", default="cifar100", help="a data set or folder, as for lps zoo build")
    parser.add_argument("--recipe", default="paper", help="how each network is trained")
    parser.add_argument("--models", default="10", help="models of each task")
    parser.add_argument("--until", default="80", help="stop after this many epochs")
    parser.add_argument("--keep", default="10,20,40,60", help="epochs after which each network is also kept")
    parser.add_argument("--seconds", type=int, default=480, help="time for training")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu")
    args = parser.parse_args()
    if args.packed.is_dir() and not args.out.exists(): shutil.copytree(args.packed, args.out)
    command = [sys.executable, "-c", "from lps.cli import main; main()", "zoo", "build", str(args.build), "--seed", "0"]
    for name in ("device", "images", "recipe", "models", "until", "keep"): command += [f"--{name}", getattr(args, name)]
    if args.out.is_dir(): command += ["--packed", str(args.out)]
    whole = build_for(args.seconds, command)
    kept = args.build.glob("epochs/[0-9]*")
    finished = sorted(int(folder.name) for folder in kept if any(folder.glob("*.safetensors")))
    if finished:
        pack = [sys.executable, str(ROOT/"scripts/pack_zoo.py"), str(args.build), str(args.out), "--epochs"]
        subprocess.run([*pack, *map(str, finished)], check=True)
    print("all networks are packed" if whole else f"time is over after {args.seconds} s: run it again to go on")


if __name__ == "__main__": main()
