# Run one process of a job: bash environment.sh CODE PYTHON ARGUMENTS...
# This script starts every process of every job, on the compute node. Put settings here that
# `slurm.setup` in the cluster's YAML cannot express; a run copies your changes at its next submission.
export PYTHONPATH="$1${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1  # otherwise `python -m` imports kdhpc from the folder where sweep.py was typed
shift
threads="${SLURM_CPUS_PER_TASK:-1}"
export OMP_NUM_THREADS="$threads" MKL_NUM_THREADS="$threads" OPENBLAS_NUM_THREADS="$threads"
# Just-in-time caches are kept on the node, off the shared file system; all jobs of a user share one.
# Their content is run as code, so a folder that somebody else created is not used.
scratch="${KDHPC_SCRATCH:-${TMPDIR:-/tmp}}/kdhpc-$(id -u)"
{ mkdir -m 700 -p "$scratch" && [ ! -L "$scratch" ] && [ -O "$scratch" ]; } || scratch="$(mktemp -d)"
export TRITON_CACHE_DIR="$scratch/triton" TORCHINDUCTOR_CACHE_DIR="$scratch/inductor"
# Compute nodes may have no network, so the libraries must not try to use it.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
trap '' USR2  # the warning before the time limit would kill a process without a handler yet
exec "$@"
