// The types of what the trainer sends: docs/wire.md and docs/metrics.md explain them.
// Made by `python -m docs.generate` from shared/schemas.py.

/**
 * @typedef {object} TrainerStatus
 * @property {"starting" | "ready" | "dead"} state
 * @property {string} detail
 * @property {string} model
 * @property {BaseIdentity | null} base
 * @property {RunStatus | null} run
 */

/**
 * @typedef {object} BaseIdentity
 * @property {string} weights
 * @property {string | null} recipe
 * @property {string} tokenizer
 * @property {string | null} chat_template
 */

/**
 * @typedef {object} RunStatus
 * @property {string} run_id
 * @property {"running" | "stopping" | "stopped" | "completed" | "failed" | "external" | "suspended"} state
 * @property {string} detail
 * @property {string[]} stalls
 * @property {number} step
 * @property {number | null} num_steps
 * @property {PolicyId} policy
 * @property {StepRecord | null} last_step
 * @property {EvalRecord | null} last_eval
 * @property {string} run_dir
 */

/**
 * @typedef {object} PolicyId
 * @property {string} run_id
 * @property {number} incarnation
 * @property {number} version
 */

/**
 * @typedef {object} LagKl
 * @property {number} lag
 * @property {number} kl
 * @property {number} num_tokens
 */

/**
 * @typedef {object} StepRecord
 * @property {number} loss
 * @property {number} grad_norm
 * @property {number} learning_rate
 * @property {number} [entropy]
 * @property {number} [clip_fraction]
 * @property {number} [importance_weight_mean]
 * @property {number} [importance_truncated_fraction]
 * @property {number} [importance_masked_fraction]
 * @property {number} [logprob_gap]
 * @property {number} [logprob_gap_p99]
 * @property {number} [logprob_gap_max]
 * @property {number} [probability_factor]
 * @property {number} [sampler_kl]
 * @property {LagKl[]} [kl_by_lag]
 * @property {number} [token_ess]
 * @property {number} [sequence_ess]
 * @property {number} num_fresh_tokens
 * @property {number} [fresh_sequence_ess]
 * @property {number} [fresh_masked_fraction]
 * @property {number} [reference_kl]
 * @property {number} [value_loss]
 * @property {number} [value_clip_fraction]
 * @property {number} [explained_variance]
 * @property {number} [preference_accuracy]
 * @property {number} [preference_margin]
 * @property {number} num_forward_tokens
 * @property {number} update_tokens_per_s
 * @property {number} peak_memory_bytes
 * @property {"step"} kind
 * @property {number} step
 * @property {PolicyId} policy
 * @property {number} num_groups
 * @property {number} [num_constant_groups]
 * @property {number} [num_constant_groups_set_aside]
 * @property {number} num_samples
 * @property {number} num_tokens
 * @property {number} [reward_mean]
 * @property {number} [reward_std]
 * @property {number} completion_tokens_mean
 * @property {number} [truncated_fraction]
 * @property {number} [staleness_mean]
 * @property {number} [staleness_max]
 * @property {Record<string, number>} [staleness_histogram]
 * @property {number} [num_continued]
 * @property {number} [num_ready_groups]
 * @property {number} [num_in_flight_groups]
 * @property {number} [wait_s]
 * @property {number} [generate_s]
 * @property {number} [reward_s]
 * @property {number} update_s
 * @property {number} publish_s
 * @property {number} sync_s
 * @property {number} step_s
 * @property {number} tokens_per_s
 * @property {number} [trainer_idle_fraction]
 * @property {number} [rollout_idle_fraction]
 * @property {number} num_serving_replicas
 * @property {number} adapter_bytes
 */

/**
 * @typedef {object} EvalRecord
 * @property {"eval"} kind
 * @property {number} step
 * @property {PolicyId} policy
 * @property {number} num_prompts
 * @property {number} sampled_reward
 * @property {number} greedy_reward
 * @property {number} eval_s
 */

/**
 * @typedef {object} ReplicasResponse
 * @property {ReplicaStatus[]} replicas
 */

/**
 * @typedef {object} ReplicaStatus
 * @property {string} id
 * @property {string} url
 * @property {"configured" | "registered"} source
 * @property {"discovered" | "admitting" | "serving" | "draining" | "quarantined" | "gone"} state
 * @property {string} detail
 * @property {string | null} boot_id
 * @property {PolicyId | null} policy
 * @property {number} num_outstanding_completions
 * @property {number} num_outstanding_tokens
 * @property {number | null} logprob_gap
 * @property {number | null} last_sync_s
 * @property {number} num_failures
 */

/**
 * @typedef {object} CompletionsResponse
 * @property {string} run_id
 * @property {string[]} reward_names
 * @property {RecentGroup[]} groups
 */

/**
 * @typedef {object} RecentGroup
 * @property {number} step
 * @property {number} group
 * @property {string} prompt
 * @property {number} num_prompt_tokens
 * @property {RecentCompletion[]} completions
 */

/**
 * @typedef {object} RecentCompletion
 * @property {string} text
 * @property {number} reward
 * @property {number[]} rewards
 * @property {Segment[]} segments
 * @property {"stop" | "length" | "interrupted"} finish_reason
 * @property {number} num_tokens
 */

/**
 * @typedef {object} Segment
 * @property {PolicyId} policy
 * @property {number} num_tokens
 */

/**
 * @typedef {object} StateRecord
 * @property {"state"} kind
 * @property {"running" | "stopping" | "stopped" | "completed" | "failed" | "external" | "suspended"} state
 * @property {string} detail
 */

/** @typedef {StepRecord | EvalRecord | StateRecord} RunEvent */

export {};
