#!/usr/bin/env bash
# Training on several GPU machines under SLURM: `sbatch scripts/slurm.sh configs/modern_1b.py runs/modern_1b`.
# One process a GPU; JAX reads from SLURM's environment who each is. SLURM sends SIGTERM to the processes two to three minutes before the
# job's time is up: all save the same step, and the script has the job run again, as after a process that was lost (exit code 5).
# Where a machine is lost SLURM ends the job and runs it again by itself (--requeue).
#SBATCH --job-name=textgen
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
config=${1:?a file of configs/}
workdir=${2:?a folder that all machines see}
. .venv/bin/activate || exit 2
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" python train.py --config="$config" --workdir="$workdir" "${@:3}"
code=$?
case $code in
  0|1|2|3|4|126|127) exit "$code" ;;  # done, or nothing that another try would help
esac
restarts=${SLURM_RESTART_COUNT:-0}
echo "exit code $code, restart $restarts" >&2
[ "$restarts" -lt 100 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
