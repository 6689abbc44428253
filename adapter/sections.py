"""The sections of a deployment's settings: engine, API, log, trainer and watcher, each field with its default.

How they are read, checked and handed on is in `adapter.settings`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """One section: immutable, and nothing in it that is not known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineSettings(Section):
    """The decoding engine."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "cpu",
        description="where the models run; auto: on a CUDA GPU with Triton where there is one, else on the CPU. "
        "The way over a GPU is tested without one and has not run on one yet",
    )
    max_batch: int = Field(8, ge=1, le=256, description="requests decoded together")
    max_model_len: int = Field(2048, ge=16, description="prompt and answer tokens of one request")
    kv_tokens: int = Field(
        0, ge=0, description="tokens the KV cache holds, all requests together; 0: as many as the memory allows and "
        "a full batch can use",
    )  # fmt: skip
    memory_gib: float = Field(
        0.0, ge=0, description="memory for weights, drafts and KV cache; 0: four fifths of what is available at start"
    )
    block_tokens: int = Field(16, ge=1, le=256, description="tokens of one KV block")
    prefill_tokens: int = Field(512, ge=16, description="prompt tokens processed in one step at the most")
    max_waiting: int = Field(256, ge=1, description="requests queued before new ones get a 429")
    prefix_cache: bool = Field(True, description="share the cached keys and values of equal prompt beginnings")
    gamma: int = Field(
        2, ge=0, le=16, description="tokens drafted in a round by the fixed controller, unless a request says otherwise"
    )
    gamma_max: int = Field(
        8,
        ge=0,
        le=16,
        description="the most a round may draft, whether the adaptive controller or a request asks for it; "
        "at least `gamma` under the fixed controller",
    )
    coupling: Literal["gumbel", "maximal"] = Field(
        "gumbel", description="gumbel: same text with and without speculation; maximal: same law only"
    )
    proposers: tuple[Literal["draft", "ngram", "past"], ...] = Field(
        ("draft", "ngram", "past"),
        description="what may draft: draft, the draft model; ngram, matches in a request's own text; past, matches in "
        "past outputs",
    )
    past_tokens: int = Field(
        200_000, ge=1024, description="past output tokens held for matching, all tenants together; about 150 bytes each"
    )
    draft_vocab_size: int = Field(
        8192, ge=0, description="tokens the draft scores, chosen from traffic; 0: all the target has"
    )
    controller: Literal["adaptive", "fixed"] = Field(
        "adaptive",
        description="adaptive: draft what promises most tokens per second; fixed: always `gamma`, and from the draft "
        "model alone where there is one",
    )
    hysteresis: float = Field(
        0.03, ge=0, lt=1, description="how much more another draft length must promise to replace the one in force"
    )
    explore_share: float = Field(
        0.01, ge=0, le=0.2, description="share of time single requests may draft although it does not pay, to learn"
    )
    switchback_share: float = Field(
        0.01,
        ge=0,
        le=0.2,
        description="share of steps run without speculation, to measure what it brings; about 7 % while it looks bad",
    )
    lean: bool = Field(
        True, description="run Llama-shaped models through the lean forward; false leaves them to transformers"
    )
    draft_int8: bool = Field(
        True, description="let a bfloat16 draft keep its weights in int8 where the CPU can; no output depends on it"
    )
    pack: bool = Field(
        True, description="keep a second copy of linear weights, laid out for the CPU; false is slower in less memory"
    )
    compiled: bool = Field(
        True,
        description="compute Llama-shaped models, and what a step asks of logits, in our own C kernels where there is "
        "a compiler and AVX-512",
    )
    threads: int = Field(0, ge=0, description="torch threads; 0 leaves the choice to torch")
    swap_poll_s: float = Field(0.2, gt=0, description="how often the registry is asked for a new live version")
    alternates: int = Field(
        2, ge=0, le=8, description="draft versions that may draft beside the live one, for requests they fit better; "
        "each takes the memory of one more draft; 0: none",
    )  # fmt: skip
    max_lora_norm_ratio: float = Field(
        2.0, gt=0, description="largest allowed ‖ΔW‖/‖W0‖ of a layer before an artifact is refused"
    )


MOST_CHOICES = 1024  # that a server can be set to give for one request


class ApiSettings(Section):
    """The HTTP front: who may ask, for how much, and how it leaves."""

    keys: tuple[Annotated[str, Field(min_length=8)], ...] = Field(
        (), description="keys of 8 characters or more, any of which opens the API; unset: nobody is asked for one"
    )
    served_model_name: str | None = Field(
        None, min_length=1, max_length=256, description="name clients ask for; unset: the target's own"
    )
    max_body_bytes: int = Field(8 << 20, ge=1024, description="longest request body; longer ones get a 413")
    max_choices: int = Field(64, ge=1, le=MOST_CHOICES, description="answers one request may ask for, prompts times n")
    drain_s: float = Field(20.0, ge=0, description="how long running requests may take to end after SIGTERM")
    spec_metrics: Literal["none", "summary"] = Field(
        "none", description="summary: every answer carries metrics.speculative_decoding, asked for or not"
    )


class LogSettings(Section):
    """What the engine logs for training and monitoring."""

    enabled: bool = Field(True, description="write verified blocks and outcomes at all")
    top_k: int = Field(32, ge=1, le=256, description="target log-probs kept a position")
    accepted_share: float = Field(
        1.0, gt=0, le=1, description="chance that a position which was not rejected is logged; rejections always are"
    )
    flush_tokens: int = Field(256, ge=16, description="a long request is logged every so many tokens")
    max_context_tokens: int = Field(768, ge=16, description="context tokens carried by one block")
    queue_entries: int = Field(512, ge=1, description="entries held in memory while Redis is slow or gone")
    stream_max_entries: int = Field(20000, ge=10, description="entries kept in each Redis stream, at the most")
    stream_max_bytes: int = Field(
        192 << 20, ge=1 << 16, description="payload bytes kept in each Redis stream, about; fewer entries where they "
        "are long. The bundled server holds 512 MB in all"
    )  # fmt: skip
    timeout_s: float = Field(1.0, gt=0, description="how long one Redis call may take")
    retry_s: float = Field(1.0, gt=0, description="pause before a broken Redis connection is tried again")


class DistillSettings(Section):
    """The trainer and its gate."""

    min_requests: int = Field(60, ge=1, description="logged requests needed before a training starts")
    max_blocks: int = Field(4000, ge=8, description="blocks kept in the replay store")
    replay_bytes: int = Field(256 << 20, ge=1 << 16, description="bytes the replay store holds, the anchor set apart")
    replay_age_s: float = Field(30 * 86400.0, gt=0, description="age at which a block is dropped from the store")
    replay_half_life_s: float = Field(
        7 * 86400.0, gt=0, description="age at which a block is drawn for replay half as often"
    )
    tenant_share: float = Field(
        0.5, gt=0, le=1, description="most of a training's records one tenant may supply while there are others"
    )
    anchor_requests: int = Field(24, ge=0, description="requests a segment gives to the anchor set, never trained on")
    holdout_share: float = Field(0.2, gt=0, lt=1, description="share of requests never trained on")
    replay_share: float = Field(0.25, ge=0, lt=1, description="share of a batch drawn from older traffic")
    rank: int = Field(16, ge=1, le=256, description="LoRA rank")
    alpha: float = Field(32.0, gt=0, description="LoRA alpha; the update is scaled by alpha / rank")
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (6e-3, 3e-3), min_length=1, max_length=4, description="peak learning rates to try; the best one goes on"
    )
    trial_share: float = Field(0.25, gt=0, le=1, description="part of a training that every learning rate gets")
    loss: Literal["kl", "nla", "blend", "lk"] = Field(
        "lk",
        description="kl: match the target's law; nla: -log of the acceptance; blend: kl, then half of each; lk: kl "
        "while acceptance is low, more and more of nla as it rises",
    )
    greedy_temperature: float = Field(
        1.0, gt=0, le=2, description="temperature at which a greedy request's law is taught"
    )
    half_precision: bool = Field(
        True, description="products in bfloat16 where the machine multiplies it natively; the loss stays in float32"
    )
    epochs: float = Field(6.0, gt=0, description="passes over the fresh training blocks, at the most")
    max_seconds: float = Field(
        240.0, gt=0, description="time a training may spend on steps; the whole job may take twice that and two minutes"
    )
    batch_tokens: int = Field(1024, ge=64, description="tokens of one optimizer step")
    rejected_weight: float = Field(1.0, gt=0, description="weight of rejected positions in the loss")
    accepted_weight: float = Field(1.0, ge=0, description="weight of all others; 0 learns from rejections only")
    gate_min_gain: float = Field(0.0, description="lower bound of the acceptance gain must exceed this")
    gate_confidence: float = Field(0.95, gt=0.5, lt=1, description="confidence of the gate's interval")
    gate_min_requests: int = Field(10, ge=2, description="held-out requests the gate needs to say yes")
    gate_anchor_margin: float = Field(0.02, ge=0, lt=1, description="loss of acceptance on the anchor set tolerated")
    gate_goodput_margin: float = Field(0.01, ge=0, lt=1, description="predicted loss of tokens per second tolerated")
    gate_parity_margin: float = Field(
        0.03, gt=0, lt=1, description="how far the stored file may score from what the trainer measured"
    )
    switch_min_gain: float = Field(
        0.02, ge=0, lt=1, description="acceptance a kept version must win on the newest requests to be gone back to"
    )
    nice: int = Field(10, ge=0, le=19, description="niceness of the trainer process")
    busy_share: float = Field(
        0.08, ge=0, le=1, description="share of the time in which requests run that a training takes from them, where "
        "both compute on a CPU; it has the rest to itself. 1: it does not yield but has cores of its own",
    )  # fmt: skip
    threads: int = Field(
        0, ge=0, description="torch threads of a trainer process; 0: all cores where it yields to serving, else one"
    )
    processes: int = Field(
        1, ge=1, le=64, description="trainer processes that share one draft, each holding a part of it; 1: no sharding"
    )
    lease_s: float = Field(30.0, gt=1, description="a job whose worker is silent this long is taken over")
    seed: int = Field(0, ge=0, description="seed of splits, order and initial LoRA weights")


class MonitorSettings(Section):
    """The watcher: drift, guard, alerts."""

    window_s: float = Field(5.0, gt=0, description="length of one recorded acceptance window")
    baseline_requests: int = Field(60, ge=10, description="requests that set a segment's baseline")
    drift_false_alarms_per_30_days: float = Field(1.0, gt=0, description="for all segments together")
    drift_expected_requests_per_s: float = Field(1.0, gt=0, description="traffic the false-alarm rate refers to")
    drift_margin: float = Field(0.02, ge=0, lt=0.5, description="fall of acceptance that is not yet drift")
    retrain_cooldown_s: float = Field(30.0, ge=0, description="pause after a training before the next")
    adapt: bool = Field(True, description="ask for trainings by itself; off: only a person does")
    evidence_requests: int = Field(
        400, ge=1, description="requests since the last training that ask for one without any drift"
    )
    trainings_per_day: int = Field(48, ge=1, description="trainings in 24 h; then the loop asks for none")
    training_seconds_per_day: float = Field(14400.0, gt=0, description="seconds of training in 24 h, likewise")
    failures_in_a_row: int = Field(
        5, ge=1, description="trainings on drift that bring nothing, one after the other, before the loop gives up"
    )
    payoff_days: float = Field(3.0, gt=0, description="days over which trainings must save more than they cost")
    auto_promote: bool = Field(True, description="promote a version that passed its gate")
    guard_min_requests: int = Field(30, ge=5, description="requests a new version serves before it is judged")
    guard_margin: float = Field(0.02, ge=0, description="loss of acceptance the guard tolerates")
    webhook_urls: tuple[str, ...] = Field((), description="Apprise URLs that receive alerts")
