"""``facemae JOB``: lists the jobs, and hands the rest of the command line to one of them."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

from cluster.log import set_up

JOBS = {
    "plan": "memory, actors, traffic and hours of a run of any size, from measured rates",
    "ingest": "faces from a folder, .rec, tars or the synthetic renderer into a data set",
    "train": "train FaceMAE on a data set (Ray Train + DeepSpeed)",
    "protect": "reconstruct every image of a data set with a protection",
    "embed": "embed every image of a data set with a recogniser",
    "leakage": "measure how many protected images can be traced to their originals",
    "report": "one HTML page from a leakage folder",
    "verify": "re-read a data set and account for every image",
    "pipeline": "all of it from one YAML file, resumable step by step",
    "pretrain": "train a recogniser on a data set, protected or not (Ray Train + DeepSpeed + Partial FC)",
    "evaluate": "score recognisers on verification and identification protocols",
    "compare": "protections and strengths: leakage against verification error, in one table and one picture",
    "submit": "run a job on Kubernetes (KubeRay) or on a Ray cluster, and follow it",
    "status": "how far a data set or a whole run is, from its store",
    "cancel": "stop a submitted job; what is committed stays",
    "demo": "the pipeline on synthetic faces, with its own S3 server and Ray",
}


def main() -> int:
    """Entry point of the ``facemae`` command."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if sys.argv[1] == "--version":
        print(f"facemae {importlib.metadata.version('facemae')}")
        return 0
    try:
        set_up()  # before the job imports Ray
    except ValueError as error:
        print(f"facemae: {error}", file=sys.stderr)
        return 2
    job = sys.argv[1]
    if job not in JOBS:
        print(f"facemae: no job {job!r}; the jobs are {', '.join(JOBS)} (facemae --help)", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(f"jobs.{job}").main(sys.argv[2:]))
    except KeyboardInterrupt:  # the libraries were still being imported: nothing had begun
        print(f"\nfacemae {job}: stopped before it began", file=sys.stderr)
        return 130


def _help() -> str:
    lines = [f"  {name:9}  {text}" for name, text in JOBS.items()]
    return "\n".join(
        [
            "facemae: share a face data set without sharing the faces.",
            "",
            "usage: facemae JOB [--config FILE.yaml] [flags]        facemae JOB --help",
            "",
            *lines,
            "",
            "In the order a team uses them:",
            "  facemae ingest  --source faces/ --output s3://bucket/original",
            "  facemae embed   --input s3://bucket/original --recognizer inside.onnx",
            "  facemae train   --data s3://bucket/original --recognizer inside.onnx --output s3://bucket/run",
            "  facemae protect --input s3://bucket/original --output s3://bucket/safe --method facemae --weights s3://bucket/run",
            "  facemae leakage --original s3://bucket/original --protected s3://bucket/safe --recognizer attacker.onnx --output leakage",
            "  facemae report  --output leakage",
            "A root is a local folder or s3://bucket/prefix; endpoint and credentials come from boto3's ordinary places.",
            "Every job can be stopped and run again: it goes on where it was. Start with `facemae demo`.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
