//! The clock of one request.

use super::{Metrics, OfAnswer, OfModel};
use crate::answer::Piece;
use crate::{Finish, Running, Served};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// Measures the answers to one request while they come. Answers that have not ended when it goes were given up.
pub struct Meter {
    labels: OfModel,
    /// When the request came, and when it was put to the engine.
    start: Instant,
    queued: Instant,
    /// When the engine began to read the prompt.
    begun: Arc<OnceLock<Instant>>,
    choices: Vec<Choice>,
    longest: usize,
    first_token: Histogram,
    inter_token: Histogram,
    per_token: Histogram,
    whole: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
    prompt_lengths: Histogram,
    computed_lengths: Histogram,
    answer_lengths: Histogram,
    longest_answers: Histogram,
    prefix_queries: Counter,
    prefix_hits: Counter,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    answers: Family<OfAnswer, Counter>,
}

/// One of the answers.
#[derive(Clone, Copy, Default)]
struct Choice {
    /// Its first and last token so far.
    times: Option<(Instant, Instant)>,
    ended: bool,
}

impl Metrics {
    /// Measures `running`, the answers to a request that came at `start` and asked for `n` of at most `max_tokens` each.
    pub fn meter(
        &self,
        served: &Served,
        start: Instant,
        (n, max_tokens): (usize, Option<usize>),
        running: &Running,
    ) -> Meter {
        let labels = OfModel { model_name: served.id.clone() };
        self.wanted_answers.get_or_create(&labels).observe(n as f64);
        if let Some(most) = max_tokens {
            self.wanted_tokens.get_or_create(&labels).observe(most as f64);
        }
        Meter {
            first_token: self.first_token.get_or_create(&labels).clone(),
            inter_token: self.inter_token.get_or_create(&labels).clone(),
            per_token: self.per_token.get_or_create(&labels).clone(),
            whole: self.whole.get_or_create(&labels).clone(),
            queue: self.queue.get_or_create(&labels).clone(),
            prefill: self.prefill.get_or_create(&labels).clone(),
            decode: self.decode.get_or_create(&labels).clone(),
            inference: self.inference.get_or_create(&labels).clone(),
            prompt_lengths: self.prompt_lengths.get_or_create(&labels).clone(),
            computed_lengths: self.computed_lengths.get_or_create(&labels).clone(),
            answer_lengths: self.answer_lengths.get_or_create(&labels).clone(),
            longest_answers: self.longest_answers.get_or_create(&labels).clone(),
            prefix_queries: self.prefix_queries.get_or_create(&labels).clone(),
            prefix_hits: self.prefix_hits.get_or_create(&labels).clone(),
            prompt_tokens: self.prompt_tokens.get_or_create(&labels).clone(),
            generation_tokens: self.generation_tokens.get_or_create(&labels).clone(),
            answers: self.answers.clone(),
            labels,
            start,
            queued: running.queued,
            begun: running.answers.begun(),
            choices: vec![Choice::default(); n],
            longest: 0,
        }
    }
}

impl Meter {
    /// A piece has come.
    pub fn piece(&mut self, piece: &Piece) {
        let now = Instant::now();
        let choice = &mut self.choices[piece.choice];
        if !piece.tokens.is_empty() {
            match &mut choice.times {
                None => {
                    self.first_token.observe((now - self.start).as_secs_f64());
                    choice.times = Some((now, now));
                }
                Some((_, last)) => {
                    self.inter_token.observe((now - *last).as_secs_f64());
                    *last = now;
                }
            }
            self.generation_tokens.inc_by(piece.tokens.len() as u64);
        }
        let Some((finish, usage)) = &piece.finish else { return };
        choice.ended = true;
        let times = choice.times;
        let passed = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64();
        self.whole.observe(passed(self.start, now));
        let begun = self.begun.get().copied();
        if let Some(begun) = begun {
            self.queue.observe(passed(self.queued, begun));
        }
        if let Some((first, last)) = times {
            self.decode.observe(passed(first, last));
            if let Some(begun) = begun {
                self.prefill.observe(passed(begun, first));
                self.inference.observe(passed(begun, last));
            }
            if let gaps @ 1.. = usage.completion_tokens.saturating_sub(1) {
                self.per_token.observe(passed(first, last) / gaps as f64);
            }
        }
        if piece.choice == 0 {
            self.prompt_lengths.observe(usage.prompt_tokens as f64);
            let computed = usage.prompt_tokens.saturating_sub(usage.cached_tokens);
            self.computed_lengths.observe(computed as f64);
            self.prompt_tokens.inc_by(usage.prompt_tokens as u64);
            self.prefix_queries.inc_by(usage.prompt_tokens as u64);
            self.prefix_hits.inc_by(usage.cached_tokens as u64);
        }
        self.answer_lengths.observe(usage.completion_tokens as f64);
        self.longest = self.longest.max(usage.completion_tokens);
        if self.choices.iter().all(|choice| choice.ended) {
            self.longest_answers.observe(self.longest as f64);
        }
        self.count(match finish {
            Finish::Stop { .. } | Finish::ToolCalls => "stop",
            Finish::Length => "length",
            Finish::Failed(_) => "error",
        });
    }

    fn count(&self, finished_reason: &'static str) {
        let model_name = self.labels.model_name.clone();
        self.answers.get_or_create(&OfAnswer { model_name, finished_reason }).inc();
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        for _ in self.choices.iter().filter(|choice| !choice.ended) {
            self.count("abort");
        }
    }
}
