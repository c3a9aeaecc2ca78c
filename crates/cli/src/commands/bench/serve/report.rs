//! What a run is told as.

use super::answer::Answer;
use super::client::Outcome;
use crate::args::bench::{Endpoint, Serve};
use crate::console;
use anyhow::Result;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// Kinds of failure that are told.
const MOST_ERRORS: usize = 10;

#[derive(Debug, Serialize)]
pub struct Report {
    url: String,
    endpoint: &'static str,
    model: String,
    /// Clients of a closed loop, or requests per second of an open one.
    #[serde(skip_serializing_if = "Option::is_none")]
    concurrency: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate: Option<f64>,
    requests: u32,
    max_tokens: u32,
    prompt_words: u32,
    shared_prefix_words: u32,
    same_prompt: bool,
    temperature: f32,
    seed: u64,
    /// Sent and answered or failed; fewer than `requests` after Ctrl-C.
    sent: usize,
    good: usize,
    failed: usize,
    /// Failures, alike ones together.
    errors: Vec<Failure>,
    seconds: f64,
    prompt_tokens: u64,
    completion_tokens: u64,
    /// `usage` when the server told it in every good answer, else `events`.
    token_count_from: &'static str,
    events: u64,
    text_events: u64,
    tokens_per_second: f64,
    requests_per_second: f64,
    events_per_second: f64,
    ttft_ms: Summary,
    itl_ms: Summary,
    tpot_ms: Summary,
    end_to_end_ms: Summary,
    finish_reasons: BTreeMap<String, usize>,
    /// Streams by events with text, held against the tokens that the server counts.
    events_per_token: EventsPerToken,
    /// Different texts among good answers, which is 1 for greedy answers to one prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    distinct_answers: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    verified: Option<Verified>,
    most_at_once: usize,
    /// The longest that a request of an open loop was sent after its time.
    latest_ms: f64,
    /// Share of one core that this program took, where the system tells: close to 1, it was what limited the rate.
    client_core_share: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Failure {
    message: String,
    count: usize,
}

#[derive(Debug, Default, Serialize)]
struct EventsPerToken {
    one: usize,
    fewer: usize,
    more: usize,
}

/// What asking again came to.
#[derive(Debug, Default, Serialize)]
pub struct Verified {
    /// Prompts asked again.
    pub asked: usize,
    /// Answers with the streamed text.
    pub same: usize,
    /// Numbers of requests with another one.
    pub different: Vec<usize>,
    /// Why some could not be compared.
    pub failed: Vec<String>,
}

/// Percentiles in milliseconds, linear between neighbours; null of nothing.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Summary {
    p50: Option<f64>,
    p90: Option<f64>,
    p95: Option<f64>,
    p99: Option<f64>,
    max: Option<f64>,
}

impl Summary {
    fn new(durations: impl Iterator<Item = Duration>) -> Self {
        let mut ms: Vec<f64> = durations.map(|d| d.as_secs_f64() * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = ms.len().checked_sub(1)? as f64 * share;
            let (low, high) = (ms[place.floor() as usize], ms[place.ceil() as usize]);
            // Of a microsecond more is not known.
            Some(((low + (high - low) * place.fract()) * 1e3).round() / 1e3)
        };
        Self { p50: at(0.5), p90: at(0.9), p95: at(0.95), p99: at(0.99), max: at(1.0) }
    }

    fn row(&self, name: &str) -> String {
        let shown =
            |value: &Option<f64>| value.map_or_else(|| "–".to_owned(), |ms| format!("{ms:.2}"));
        let values = [&self.p50, &self.p90, &self.p95, &self.p99, &self.max]
            .map(|value| format!("{:>10}", shown(value)));
        format!("{name:<16}{}", values.concat())
    }
}

impl Report {
    pub fn new(args: &Serve, seed: u64, outcome: &Outcome, verified: Option<Verified>) -> Self {
        let good: Vec<&Answer> = outcome
            .answers
            .iter()
            .map(|(_, answer)| answer)
            .filter(|answer| answer.fault.is_none())
            .collect();
        let sum = |count: fn(&Answer) -> u64| good.iter().map(|answer| count(answer)).sum::<u64>();
        let per_second = |count: u64| count as f64 / outcome.seconds.max(1e-9);
        let (mut finish_reasons, mut faults) = (BTreeMap::new(), BTreeMap::new());
        let mut events_per_token = EventsPerToken::default();
        for answer in &good {
            *finish_reasons.entry(answer.finish_reason.clone().unwrap_or_default()).or_default() +=
                1;
            if let Some(usage) = answer.usage {
                match answer.text_events.cmp(&usage.completion_tokens) {
                    std::cmp::Ordering::Less => events_per_token.fewer += 1,
                    std::cmp::Ordering::Equal => events_per_token.one += 1,
                    std::cmp::Ordering::Greater => events_per_token.more += 1,
                }
            }
        }
        for fault in outcome.answers.iter().filter_map(|(_, answer)| answer.fault.as_ref()) {
            *faults.entry(fault.to_string()).or_insert(0) += 1;
        }
        let mut errors: Vec<Failure> =
            faults.into_iter().map(|(message, count)| Failure { message, count }).collect();
        errors.sort_by_key(|failure| std::cmp::Reverse(failure.count));
        errors.truncate(MOST_ERRORS);
        let distinct = || {
            good.iter().map(|answer| &answer.text).collect::<std::collections::BTreeSet<_>>().len()
        };
        let completion_tokens = sum(Answer::tokens);
        Self {
            url: args.url.clone(),
            endpoint: match args.endpoint {
                Endpoint::Chat => "chat",
                Endpoint::Completions => "completions",
            },
            model: args.model.clone(),
            concurrency: args
                .rate
                .is_none()
                .then(|| args.concurrency.unwrap_or(super::CONCURRENCY)),
            rate: args.rate,
            requests: args.requests,
            max_tokens: args.max_tokens,
            prompt_words: args.prompt_words,
            shared_prefix_words: args.shared_prefix_words,
            same_prompt: args.same_prompt,
            temperature: args.temperature,
            seed,
            sent: outcome.answers.len(),
            good: good.len(),
            failed: outcome.answers.len() - good.len(),
            errors,
            seconds: outcome.seconds,
            prompt_tokens: sum(|answer| answer.usage.map_or(0, |usage| usage.prompt_tokens)),
            completion_tokens,
            token_count_from: if !good.is_empty()
                && good.iter().all(|answer| answer.usage.is_some())
            {
                "usage"
            } else {
                "events"
            },
            events: sum(|answer| answer.events),
            text_events: sum(|answer| answer.text_events),
            tokens_per_second: per_second(completion_tokens),
            requests_per_second: per_second(good.len() as u64),
            events_per_second: per_second(sum(|answer| answer.events)),
            ttft_ms: Summary::new(good.iter().filter_map(|answer| answer.ttft)),
            itl_ms: Summary::new(good.iter().flat_map(|answer| answer.gaps.iter().copied())),
            tpot_ms: Summary::new(good.iter().filter_map(|answer| answer.tpot())),
            end_to_end_ms: Summary::new(good.iter().filter_map(|answer| answer.total)),
            finish_reasons,
            events_per_token,
            distinct_answers: args.same_prompt.then(distinct),
            verified,
            most_at_once: outcome.most_at_once,
            latest_ms: outcome.latest.as_secs_f64() * 1e3,
            client_core_share: outcome
                .busy
                .map(|busy| busy.as_secs_f64() / outcome.seconds.max(1e-9)),
        }
    }

    /// Whether everything that was sent was answered as it must be.
    pub fn is_good(&self) -> bool {
        let verified = self
            .verified
            .as_ref()
            .is_none_or(|verified| verified.asked > 0 && verified.same == verified.asked);
        self.failed == 0 && self.good > 0 && verified
    }

    /// Prints the document, or the table.
    ///
    /// # Errors
    /// When stdout is closed.
    pub fn print(&self, json: bool) -> Result<()> {
        if json {
            return console::json(self);
        }
        let how = match self.rate {
            Some(rate) => format!(
                "{rate} a second, at most {} at once, sent up to {:.1} ms late",
                self.most_at_once, self.latest_ms
            ),
            None => format!("{} at once", self.most_at_once),
        };
        console::line(&format!(
            "requests        {} sent, {} good, {} failed in {:.2} s; {how}",
            self.sent, self.good, self.failed, self.seconds
        ))?;
        console::line(&format!(
            "tokens          {} out ({}), {} in; {} events, {} with text",
            self.completion_tokens,
            self.token_count_from,
            self.prompt_tokens,
            self.events,
            self.text_events
        ))?;
        console::line(&format!(
            "per second      {:.1} tokens, {:.2} requests, {:.1} events",
            self.tokens_per_second, self.requests_per_second, self.events_per_second
        ))?;
        let heads = ["p50", "p90", "p95", "p99", "max"].map(|name| format!("{name:>10}"));
        console::line(&format!("{:<16}{}", "milliseconds", heads.concat()))?;
        for (name, summary) in [
            ("first token", &self.ttft_ms),
            ("between tokens", &self.itl_ms),
            ("per token", &self.tpot_ms),
            ("end to end", &self.end_to_end_ms),
        ] {
            console::line(&summary.row(name))?;
        }
        let reasons: Vec<String> =
            self.finish_reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        let EventsPerToken { one, fewer, more } = self.events_per_token;
        console::line(&format!(
            "streams         finished by {}; one event per token in {one}, fewer in {fewer}, more in {more}",
            if reasons.is_empty() { "nothing".to_owned() } else { reasons.join(", ") }
        ))?;
        if let Some(count) = self.distinct_answers {
            console::line(&format!("same prompt     {count} different answers"))?;
        }
        if let Some(Verified { asked, same, different, failed }) = &self.verified {
            console::line(&format!(
                "asked again     {asked}: {same} the same, {} different, {} failed",
                different.len(),
                failed.len()
            ))?;
            failed.iter().try_for_each(|error| console::line(&format!("  {error}")))?;
        }
        for Failure { message, count } in &self.errors {
            console::line(&format!("failed          {count} × {message}"))?;
        }
        let share = self
            .client_core_share
            .map_or_else(String::new, |share| format!(" · this client took {share:.2} of a core"));
        console::note(&format!("{} · seed {}{share}", self.url, self.seed));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_linear_between_neighbours() {
        let of = |ms: &[u64]| Summary::new(ms.iter().map(|ms| Duration::from_millis(*ms)));
        // As numpy.percentile of the same numbers.
        let found = of(&[40, 10, 20, 30, 50]);
        assert_eq!(
            found,
            Summary {
                p50: Some(30.0),
                p90: Some(46.0),
                p95: Some(48.0),
                p99: Some(49.6),
                max: Some(50.0)
            }
        );
        assert_eq!(of(&[7]).p99, Some(7.0));
        assert_eq!(of(&[]), Summary::default());
    }
}
