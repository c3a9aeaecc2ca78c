//! What is measured, under our names and under those of vLLM that routers and boards read.

mod meter;

use crate::kv_events::KvEvents;
use crate::models::Models;
use crate::trace::Tracer;
use prometheus_client::encoding::{EncodeLabelSet, text::encode};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError};

/// What `/metrics` is.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfModel {
    model_name: String,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfAnswer {
    model_name: String,
    finished_reason: &'static str,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfResponse {
    path: &'static str,
    status: u16,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CacheConfig {
    model_name: String,
    block_size: u64,
    num_gpu_blocks: u64,
}

type Number = Gauge<f64, AtomicU64>;
type Times = Family<OfModel, Histogram, fn() -> Histogram>;

fn seconds() -> Histogram {
    Histogram::new([
        0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
        0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0,
    ])
}

fn lengths() -> Histogram {
    let powers = (0..18).map(|i| f64::from(1u32 << i));
    Histogram::new(powers)
}

/// Perplexities that were asked for in this process.
#[derive(Debug, Default)]
struct Perplexities {
    /// The last of them, for the median.
    recent: VecDeque<f64>,
    samples: u64,
    tokens: u64,
    sum: f64,
    /// Least and most.
    range: Option<(f64, f64)>,
}

/// Statistics of the perplexities asked for.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub struct PerplexityStats {
    /// Texts.
    pub samples: u64,
    /// Tokens scored.
    pub tokens: u64,
    /// Mean.
    pub mean: Option<f64>,
    /// Median of the last ten thousand; everything else is of all.
    pub median: Option<f64>,
    /// Least.
    pub min: Option<f64>,
    /// Most.
    pub max: Option<f64>,
}

/// Most perplexities that are remembered for the median.
const REMEMBERED: usize = 10_000;

/// Everything that `/metrics` tells.
pub struct Metrics {
    registry: Registry,
    running: Family<OfModel, Gauge>,
    waiting: Family<OfModel, Gauge>,
    cache_usage: Family<OfModel, Number>,
    cache_config: Family<CacheConfig, Gauge>,
    preemptions: Family<OfModel, Counter>,
    restarts: Family<OfModel, Counter>,
    model_bytes: Family<OfModel, Gauge>,
    prefix_queries: Family<OfModel, Counter>,
    prefix_hits: Family<OfModel, Counter>,
    prompt_tokens: Family<OfModel, Counter>,
    generation_tokens: Family<OfModel, Counter>,
    answers: Family<OfAnswer, Counter>,
    responses: Family<OfResponse, Counter>,
    first_token: Times,
    inter_token: Times,
    per_token: Times,
    whole: Times,
    queue: Times,
    prefill: Times,
    decode: Times,
    inference: Times,
    step_tokens: Times,
    prompt_lengths: Times,
    computed_lengths: Times,
    answer_lengths: Times,
    longest_answers: Times,
    wanted_answers: Times,
    wanted_tokens: Times,
    perplexity: [Number; 4],
    perplexity_samples: Counter,
    perplexity_tokens: Counter,
    perplexities: Mutex<Perplexities>,
    disconnects: Counter,
    kv_messages: Counter,
    kv_missed: Counter,
    kv_subscribers: Gauge,
    traces_exported: Counter,
    traces_dropped: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Nothing measured yet.
    pub fn new() -> Self {
        let times: fn() -> Times = || Family::new_with_constructor(seconds as fn() -> Histogram);
        let sizes: fn() -> Times = || Family::new_with_constructor(lengths as fn() -> Histogram);
        let mut metrics = Self {
            registry: Registry::default(),
            running: Family::default(),
            waiting: Family::default(),
            cache_usage: Family::default(),
            cache_config: Family::default(),
            preemptions: Family::default(),
            restarts: Family::default(),
            model_bytes: Family::default(),
            prefix_queries: Family::default(),
            prefix_hits: Family::default(),
            prompt_tokens: Family::default(),
            generation_tokens: Family::default(),
            answers: Family::default(),
            responses: Family::default(),
            first_token: times(),
            inter_token: times(),
            per_token: times(),
            whole: times(),
            queue: times(),
            prefill: times(),
            decode: times(),
            inference: times(),
            step_tokens: sizes(),
            prompt_lengths: sizes(),
            computed_lengths: sizes(),
            answer_lengths: sizes(),
            longest_answers: sizes(),
            wanted_answers: sizes(),
            wanted_tokens: sizes(),
            perplexity: Default::default(),
            perplexity_samples: Counter::default(),
            perplexity_tokens: Counter::default(),
            perplexities: Mutex::default(),
            disconnects: Counter::default(),
            kv_messages: Counter::default(),
            kv_missed: Counter::default(),
            kv_subscribers: Gauge::default(),
            traces_exported: Counter::default(),
            traces_dropped: Counter::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let r = &mut self.registry;
        // The same series under both names.
        macro_rules! both {
            ($name:literal, $help:literal, $metric:expr) => {
                r.register(concat!("marlin:", $name), $help, $metric.clone());
                r.register(concat!("vllm:", $name), $help, $metric.clone());
            };
        }
        both!("num_requests_running", "Sequences that own cache blocks", self.running);
        both!("num_requests_waiting", "Sequences that wait for cache blocks", self.waiting);
        both!("kv_cache_usage_perc", "Share of cache blocks in use, 0 to 1", self.cache_usage);
        both!("cache_config_info", "Size of the cache", self.cache_config);
        both!("num_preemptions", "Sequences that lost their blocks to others", self.preemptions);
        both!(
            "prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache",
            self.prefix_queries
        );
        both!("prefix_cache_hits", "Prompt tokens found in the prefix cache", self.prefix_hits);
        both!("prompt_tokens", "Prompt tokens of answers that ended", self.prompt_tokens);
        both!("generation_tokens", "Tokens of answers", self.generation_tokens);
        both!("request_success", "Answers that ended, by reason", self.answers);
        both!("time_to_first_token_seconds", "From request to first token", self.first_token);
        both!("inter_token_latency_seconds", "Between tokens of an answer", self.inter_token);
        both!(
            "time_per_output_token_seconds",
            "Mean of an answer's time between tokens",
            self.per_token
        );
        both!(
            "request_time_per_output_token_seconds",
            "time_per_output_token_seconds by its newer name",
            self.per_token
        );
        both!("e2e_request_latency_seconds", "From request to end of the answer", self.whole);
        both!("request_queue_time_seconds", "Until the engine began to read", self.queue);
        both!("request_prefill_time_seconds", "From there to the first token", self.prefill);
        both!("request_decode_time_seconds", "From there to the last token", self.decode);
        both!("request_inference_time_seconds", "Prefill and decode together", self.inference);
        both!("iteration_tokens_total", "Tokens computed in a step", self.step_tokens);
        both!("request_prompt_tokens", "Prompt tokens of a request", self.prompt_lengths);
        both!(
            "request_prefill_kv_computed_tokens",
            "Prompt tokens of a request that were not cached",
            self.computed_lengths
        );
        both!("request_generation_tokens", "Tokens of an answer", self.answer_lengths);
        both!(
            "request_max_num_generation_tokens",
            "Tokens of the longest answer to a request",
            self.longest_answers
        );
        both!("request_params_n", "Answers that a request asked for", self.wanted_answers);
        both!("request_params_max_tokens", "Most tokens that it allowed", self.wanted_tokens);
        r.register(
            "vllm:gpu_cache_usage_perc",
            "kv_cache_usage_perc by its older name",
            self.cache_usage.clone(),
        );
        r.register("marlin:engine_restarts", "Engines lost to a panic", self.restarts.clone());
        r.register(
            "marlin:model_bytes",
            "Bytes of a model and its cache",
            self.model_bytes.clone(),
        );
        r.register("marlin:http_responses", "Responses by path and status", self.responses.clone());
        r.register("marlin:disconnects", "Streams whose client left", self.disconnects.clone());
        r.register(
            "marlin:kv_event_messages",
            "Messages of what the caches hold",
            self.kv_messages.clone(),
        );
        r.register(
            "marlin:kv_event_messages_missed",
            "Messages that subscribers were too slow for, counted for each of them",
            self.kv_missed.clone(),
        );
        r.register(
            "marlin:kv_event_subscribers",
            "Subscribers of what the caches hold",
            self.kv_subscribers.clone(),
        );
        let (exported, dropped) = (self.traces_exported.clone(), self.traces_dropped.clone());
        r.register("marlin:traces_exported", "Requests whose spans a collector took", exported);
        r.register("marlin:traces_dropped", "Requests whose spans none took", dropped);
        let [mean, median, min, max] = &self.perplexity;
        r.register("marlin:perplexity_mean", "Mean of perplexities asked for", mean.clone());
        r.register("marlin:perplexity_median", "Their median", median.clone());
        r.register("marlin:perplexity_min", "The least of them", min.clone());
        r.register("marlin:perplexity_max", "The largest of them", max.clone());
        r.register("marlin:perplexity_samples", "How many", self.perplexity_samples.clone());
        r.register("marlin:perplexity_tokens", "Tokens scored", self.perplexity_tokens.clone());
    }

    /// The text of everything, read now.
    pub fn text(&self, models: &Models, tracer: Option<&Tracer>) -> String {
        for served in models.all_loaded() {
            let labels = OfModel { model_name: served.id.clone() };
            let stats = served.runtime.stats();
            self.running.get_or_create(&labels).set(stats.running as i64);
            self.waiting.get_or_create(&labels).set(stats.waiting as i64);
            let used =
                (stats.num_blocks - stats.free_blocks) as f64 / stats.num_blocks.max(1) as f64;
            self.cache_usage.get_or_create(&labels).set(used);
            raise(&self.preemptions.get_or_create(&labels), stats.preemptions);
            raise(&self.restarts.get_or_create(&labels), served.runtime.restarts());
            self.model_bytes.get_or_create(&labels).set(served.bytes as i64);
            let config = CacheConfig {
                model_name: served.id.clone(),
                block_size: served.block_size as u64,
                num_gpu_blocks: stats.num_blocks as u64,
            };
            self.cache_config.get_or_create(&config).set(1);
            self.begin(&labels);
        }
        if let Some(counts) = models.kv_events().map(KvEvents::counts) {
            raise(&self.kv_messages, counts.messages);
            raise(&self.kv_missed, counts.missed);
            self.kv_subscribers.set(counts.subscribers as i64);
        }
        if let Some(counts) = tracer.map(Tracer::counts) {
            raise(&self.traces_exported, counts.exported);
            raise(&self.traces_dropped, counts.dropped);
        }
        let mut text = String::new();
        // Writing to memory does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }

    /// Has every series of a model from its loading on, so that rates are right from the first request.
    fn begin(&self, labels: &OfModel) {
        let times = [
            &self.first_token,
            &self.inter_token,
            &self.per_token,
            &self.whole,
            &self.queue,
            &self.prefill,
            &self.decode,
            &self.inference,
            &self.step_tokens,
            &self.prompt_lengths,
            &self.computed_lengths,
            &self.answer_lengths,
            &self.longest_answers,
            &self.wanted_answers,
            &self.wanted_tokens,
        ];
        let counts =
            [&self.prefix_queries, &self.prefix_hits, &self.prompt_tokens, &self.generation_tokens];
        for family in times {
            drop(family.get_or_create(labels));
        }
        for family in counts {
            drop(family.get_or_create(labels));
        }
        for finished_reason in ["stop", "length", "abort", "error"] {
            let model_name = labels.model_name.clone();
            drop(self.answers.get_or_create(&OfAnswer { model_name, finished_reason }));
        }
    }

    /// Counts a response.
    pub fn responded(&self, path: &'static str, status: u16) {
        self.responses.get_or_create(&OfResponse { path, status }).inc();
    }

    /// Counts a stream whose client left before its end.
    pub fn disconnected(&self) {
        self.disconnects.inc();
    }

    /// Notes the perplexity of a text.
    pub fn scored(&self, perplexity: f64, tokens: u64) {
        let stats = {
            let mut all = self.perplexities.lock().unwrap_or_else(PoisonError::into_inner);
            all.add(perplexity, tokens);
            all.stats()
        };
        self.perplexity_samples.inc();
        self.perplexity_tokens.inc_by(tokens);
        let values = [stats.mean, stats.median, stats.min, stats.max];
        for (gauge, value) in self.perplexity.iter().zip(values) {
            gauge.set(value.unwrap_or_default());
        }
    }

    /// Statistics of the perplexities asked for.
    pub fn perplexity_stats(&self) -> PerplexityStats {
        self.perplexities.lock().unwrap_or_else(PoisonError::into_inner).stats()
    }

    /// Where the engines of models count the tokens of their steps.
    pub fn step_tokens(&self) -> StepTokens {
        StepTokens(self.step_tokens.clone())
    }
}

/// Tokens of steps, by model.
#[derive(Clone)]
pub struct StepTokens(Times);

impl StepTokens {
    /// Those of a model.
    pub fn of(&self, model: &str) -> Histogram {
        self.0.get_or_create(&OfModel { model_name: model.to_owned() }).clone()
    }
}

impl Perplexities {
    fn add(&mut self, perplexity: f64, tokens: u64) {
        if self.recent.len() == REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back(perplexity);
        self.samples += 1;
        self.tokens += tokens;
        self.sum += perplexity;
        let (least, most) = self.range.unwrap_or((perplexity, perplexity));
        self.range = Some((least.min(perplexity), most.max(perplexity)));
    }

    fn stats(&self) -> PerplexityStats {
        let mut sorted: Vec<f64> = self.recent.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let (count, middle) = (sorted.len(), sorted.len() / 2);
        let median = match count {
            0 => None,
            _ if count % 2 == 1 => Some(sorted[middle]),
            _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
        };
        PerplexityStats {
            samples: self.samples,
            tokens: self.tokens,
            mean: (count > 0).then(|| self.sum / self.samples as f64),
            median,
            min: self.range.map(|(least, _)| least),
            max: self.range.map(|(_, most)| most),
        }
    }
}

/// Counts up to `total`; what a model counted before it was loaded again stays.
fn raise(counter: &Counter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

#[cfg(test)]
mod tests {
    use super::{Metrics, REMEMBERED};

    #[test]
    fn statistics_are_of_all_requests_alike() {
        let metrics = Metrics::new();
        // The first are the extremes, and are forgotten by the median alone.
        let all = (0..REMEMBERED + 500).map(|i| [1.0, 1e6].get(i).copied().unwrap_or(i as f64));
        let all: Vec<f64> = all.collect();
        all.iter().for_each(|value| metrics.scored(*value, 3));
        let stats = metrics.perplexity_stats();
        let count = all.len() as u64;
        assert_eq!((stats.samples, stats.tokens), (count, 3 * count));
        assert_eq!((stats.min, stats.max), (Some(1.0), Some(1e6)));
        let mean = all.iter().sum::<f64>() / count as f64;
        assert!((stats.mean.unwrap() - mean).abs() < 1e-9 * mean);
        let last = &all[500..];
        assert_eq!(stats.median, Some((last[4999] + last[5000]) / 2.0));
        assert_eq!(metrics.perplexity_samples.get(), count);
        assert_eq!(Metrics::new().perplexity_stats().mean, None);
    }
}
