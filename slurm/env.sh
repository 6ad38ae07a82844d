# Sourced by the batch scripts of this folder on the first node of a job; srun passes the environment on to all ranks.
# Copy it, edit it for your cluster, and name it with MEGAMETA_ENV=/path/to/env.sh or `megameta slurm submit --env`.

# --- software ---------------------------------------------------------------------------------------------------------
# module load cuda/12.8                    # what your cluster calls it; torch's wheels bring their own CUDA libraries
source "${MEGAMETA_VENV:-.venv}/bin/activate"

# --- processes --------------------------------------------------------------------------------------------------------
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"     # else every rank takes all cores that it is bound to
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"   # ranks that are left alone print C++ traces beside the message
export PYTHONUNBUFFERED=1                          # the last lines before a crash are the ones that matter
export SLURM_UNBUFFEREDIO=1                        # the same, of srun

# --- NCCL: what is worth setting, and why -----------------------------------------------------------------------------
# Which network carries the rendezvous and NCCL's own set-up. Without it NCCL may pick a management or a container bridge
# (docker0) that the other nodes do not reach, and hangs. Name yours (ip -brief link), or exclude with ^.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0            # the same for gloo
# The InfiniBand adapters of the data network: without it NCCL also takes ones that carry storage or Ethernet.
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3
# A failed collective brings the process down (3, torch's default) rather than let its GPU work on with garbage; said here
# because older scripts set 0, which waits for ever, or 1, which first takes NCCL apart and may hang there.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3
# How long InfiniBand waits for an answer before it sends again: 4.096 µs · 2^22 ≈ 17 s. The default, 20, is 4 s, which a
# link that flaps or a busy fabric may take, and then the run ends.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
# NCCL says what went wrong, in the node's log; set INFO when a job hangs at its start, and then a file a process, because
# hundreds of lines come from each.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# export NCCL_DEBUG_FILE=nccl-%h-%p.log
# When NCCL times out, each rank writes its last collectives (torch keeps 2000) to a file of its node: for hangs that the
# table of the watchdog does not explain.
export TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-/tmp/megameta_collectives_rank_}"
# Not set: NCCL_P2P_DISABLE, NCCL_IB_DISABLE (they hide a fault at ten times the cost), NCCL_ALGO, NCCL_PROTO (NCCL's own
# choice is right on DGX-like nodes), CUDA_LAUNCH_BLOCKING (for hunting a fault, never for a run).
