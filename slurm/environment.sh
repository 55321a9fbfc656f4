# Runs one process of a job: bash environment.sh CODE PYTHON ARGUMENTS...
# Every process of every job comes through here, on the compute node. Put here what `slurm.setup` in
# the cluster's YAML cannot say; what you change is copied into a run at the next submission.
export PYTHONPATH="$1${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1  # or `python -m` takes kdhpc from the folder where sweep.py was typed
shift
threads="${SLURM_CPUS_PER_TASK:-1}"
export OMP_NUM_THREADS="$threads" MKL_NUM_THREADS="$threads" OPENBLAS_NUM_THREADS="$threads"
# Just-in-time caches stay on the node, one for all jobs of a user: off the shared file system. What
# lies in them is run as code: a folder that somebody else has made is not used.
scratch="${KDHPC_SCRATCH:-${TMPDIR:-/tmp}}/kdhpc-$(id -u)"
{ mkdir -m 700 -p "$scratch" && [ ! -L "$scratch" ] && [ -O "$scratch" ]; } || scratch="$(mktemp -d)"
export TRITON_CACHE_DIR="$scratch/triton" TORCHINDUCTOR_CACHE_DIR="$scratch/inductor"
# Compute nodes need no network.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
trap '' USR2  # the warning before a time limit would kill who does not listen to it yet
exec "$@"
