"""Training: objective, optimizer and schedule, the jitted step, checkpoints, and the one loop around them."""

from lfm_jax.training.checkpoint import CheckpointError, Checkpoints, CheckpointWarning
from lfm_jax.training.evaluation import Totals, evaluate_loss
from lfm_jax.training.loop import BatchIterator, TrainConfig, Trained, train
from lfm_jax.training.metrics import MetricsWriter, read_metrics
from lfm_jax.training.objective import Batch, LossConfig, Objective, Sums, next_token_objective
from lfm_jax.training.optimizer import OptimizerConfig, make_optimizer
from lfm_jax.training.replicas import SilentCorruption
from lfm_jax.training.schedule import ScheduleConfig, make_schedule
from lfm_jax.training.state import TrainState, abstract_state, check_mesh, init_state
from lfm_jax.training.step import check_rows, host_part, make_eval_step, make_train_step, place_batch
from lfm_jax.training.stopping import Interrupted
from lfm_jax.training.trouble import TrainingDiverged, TroubleConfig

__all__ = [
    "Batch", "BatchIterator", "CheckpointError", "CheckpointWarning", "Checkpoints", "Interrupted", "LossConfig", "MetricsWriter",
    "Objective", "OptimizerConfig", "ScheduleConfig", "SilentCorruption", "Sums", "Totals", "TrainConfig", "TrainState",
    "Trained", "TrainingDiverged", "TroubleConfig", "abstract_state", "check_mesh", "check_rows", "evaluate_loss", "host_part",
    "init_state", "make_eval_step", "make_optimizer", "make_schedule", "make_train_step", "next_token_objective", "place_batch",
    "read_metrics", "train",
]
