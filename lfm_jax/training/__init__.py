"""Training: objectives, optimizer and schedule, the jitted step, checkpoints, and the one loop around them."""

from lfm_jax.training.checkpoint import CheckpointError, Checkpoints, CheckpointWarning
from lfm_jax.training.evaluation import Totals, evaluate_loss
from lfm_jax.training.final_token import (
    FinalTokenConfig,
    final_token_losses,
    final_token_objective,
    make_final_token_logits_step,
)
from lfm_jax.training.loop import BatchIterator, ObservingBatchIterator, TrainConfig, Trained, train
from lfm_jax.training.metrics import MetricsWriter, read_metrics
from lfm_jax.training.objective import Batch, LossConfig, Objective, Sums, next_token_objective
from lfm_jax.training.optimizer import OptimizerConfig, make_optimizer
from lfm_jax.training.policy_gradient import (
    Advantages,
    PolicyGradientConfig,
    PolicySums,
    Rollouts,
    group_advantages,
    overlong_penalty,
    policy_gradient_member,
    policy_gradient_sums,
)
from lfm_jax.training.policy_objective import make_policy_log_probs_step, policy_objective
from lfm_jax.training.preference import (
    Answers,
    PairLosses,
    PreferenceConfig,
    preference_losses,
    preference_member,
)
from lfm_jax.training.preference_objective import make_log_probs_step, preference_objective
from lfm_jax.training.replicas import SilentCorruption
from lfm_jax.training.schedule import ScheduleConfig, make_schedule
from lfm_jax.training.state import TrainState, abstract_state, check_mesh, init_state
from lfm_jax.training.step import as_fed, check_rows, host_part, make_eval_step, make_train_step, place_batch
from lfm_jax.training.stopping import Interrupted
from lfm_jax.training.trouble import TrainingDiverged, TroubleConfig

__all__ = [
    "Advantages", "Answers", "Batch", "BatchIterator", "CheckpointError", "CheckpointWarning", "Checkpoints", "FinalTokenConfig",
    "Interrupted", "LossConfig", "MetricsWriter", "Objective", "ObservingBatchIterator", "OptimizerConfig", "PairLosses",
    "PolicyGradientConfig", "PolicySums", "PreferenceConfig", "Rollouts", "ScheduleConfig", "SilentCorruption", "Sums", "Totals",
    "TrainConfig", "TrainState", "Trained", "TrainingDiverged", "TroubleConfig", "abstract_state", "as_fed", "check_mesh",
    "check_rows", "evaluate_loss", "final_token_losses", "final_token_objective", "group_advantages", "host_part", "init_state",
    "make_eval_step", "make_final_token_logits_step", "make_log_probs_step", "make_optimizer", "make_policy_log_probs_step",
    "make_schedule", "make_train_step", "next_token_objective", "overlong_penalty", "place_batch", "policy_gradient_member",
    "policy_gradient_sums", "policy_objective", "preference_losses", "preference_member", "preference_objective", "read_metrics",
    "train",
]
