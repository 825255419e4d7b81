"""The teacher of a run (`--distill-from`) as it stands beside the model, on the ranks that have the head.

Tensor parallelism cuts it like the model; the pipeline and ZeRO do not. It has the run's precision, and no gradients.
"""

from __future__ import annotations

from dataclasses import replace

from mor_megatron.config.schema import Config


def beside(config: Config, teacher: Config) -> Config:
    """A teacher's settings with the layout, batch and precision that it has in a run.

    Args:
        config: of the run.
        teacher: of any run with the teacher's model.
    """
    settings = replace(
        teacher,
        model=replace(teacher.model, make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by),
        data=config.data,
        training=replace(config.training, zero_stage=0, recompute_granularity=None),
        parallel=replace(config.parallel, pipeline_model_parallel_size=1, pipeline_layers=None),
    )
    vars(settings)["plan"] = teacher.plan  # does not depend on these, and takes time
    return settings
