//! `marlin bench serve`: any OpenAI-compatible server under load.

mod answer;
mod client;
mod connection;
mod prompts;
mod report;
mod target;

use crate::args::bench::Serve;
use crate::{console, exit, interrupt};
use answer::{Answer, Fault};
use anyhow::Result;
use client::{Outcome, Plan, Schedule};
use connection::Trust;
use prompts::Prompts;
use report::{Report, Verified};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use target::Target;

/// Clients of a closed loop unless told.
const CONCURRENCY: u16 = 8;

/// Sends the requests and reports what came of them.
pub fn run(args: &Serve) -> Result<ExitCode> {
    let trust = match &args.ca_file {
        Some(file) => Trust::File(file),
        None if args.insecure => Trust::Anybody,
        None => Trust::Public,
    };
    let target = Target::find(&args.url, args.api_key.as_deref(), trust)?;
    let seed = args.seed.unwrap_or_else(fresh_seed);
    let prompts = Prompts::new(args, seed);
    let requests = args.requests as usize;
    let stop = interrupt::begin();

    let warm_up = usize::from(args.warmup);
    let load = Load { args, target: &target, prompts: &prompts, stop };
    // Numbers that no counted request has.
    let warmed = load.run(Schedule::Closed(1), warm_up, &|i| (requests + i, true), &|| ())?;
    if let Some(fault) = warmed.answers.iter().find_map(|(_, answer)| answer.fault.as_ref()) {
        interrupt::end();
        return Err(exit::coded(
            exit::FAILED,
            format!("the first requests failed, so the load was not tried: {fault}"),
        ));
    }

    let schedule = match args.rate {
        Some(rate) => Schedule::Open(prompts::arrivals(seed, rate, requests)),
        None => Schedule::Closed(usize::from(args.concurrency.unwrap_or(CONCURRENCY))),
    };
    let bar = console::bar(requests as u64, "answered", false);
    let mut outcome = load.run(schedule, requests, &|i| (i, true), &|| bar.inc(1))?;
    bar.finish_and_clear();
    if args.one_event_per_token {
        outcome.answers.iter_mut().for_each(|(_, answer)| count_events(answer));
    }
    let verified = match args.verify {
        0 => None,
        _ => Some(verify(&load, &outcome)?),
    };
    interrupt::end();

    let report = Report::new(args, seed, &outcome, verified);
    report.print(args.json)?;
    Ok(match stop.load(Ordering::Relaxed) {
        true => ExitCode::from(exit::INTERRUPTED),
        false if report.is_good() => ExitCode::SUCCESS,
        false => ExitCode::from(exit::FAILED),
    })
}

/// What all runs of one call share.
struct Load<'a> {
    args: &'a Serve,
    target: &'a Target,
    prompts: &'a Prompts<'a>,
    stop: &'a AtomicBool,
}

impl Load<'_> {
    /// Requests of which `which` tells the prompt and whether to stream.
    fn run(
        &self,
        schedule: Schedule,
        requests: usize,
        which: &dyn Fn(usize) -> (usize, bool),
        answered: &dyn Fn(),
    ) -> Result<Outcome> {
        let message = |i: usize| {
            let (prompt, stream) = which(i);
            self.target
                .post(self.prompts.path(), self.prompts.body(prompt, stream).to_string().as_bytes())
        };
        let timeout = Duration::from_secs(self.args.timeout.into());
        let plan = Plan {
            target: self.target,
            schedule,
            requests,
            timeout,
            message: &message,
            answered,
            stop: self.stop,
        };
        Ok(client::run(&plan)?)
    }
}

/// A stream must have as many events with text as the server counts tokens.
fn count_events(answer: &mut Answer) {
    if answer.fault.is_some() {
        return;
    }
    answer.fault = match answer.usage {
        None => {
            Some(Fault("the server tells no usage, so events cannot be held to tokens".to_owned()))
        }
        Some(usage) if usage.completion_tokens != answer.text_events => Some(Fault(format!(
            "{} events with text for {} tokens",
            answer.text_events, usage.completion_tokens
        ))),
        Some(_) => None,
    };
}

/// Asks for some of the answered prompts again, alone and in one piece.
fn verify(load: &Load, outcome: &Outcome) -> Result<Verified> {
    let good = outcome.answers.iter().filter(|(_, answer)| answer.fault.is_none());
    let asked: Vec<&(usize, Answer)> = good.take(load.args.verify as usize).collect();
    let again = load.run(Schedule::Closed(1), asked.len(), &|i| (asked[i].0, false), &|| ())?;
    let mut verified = Verified { asked: again.answers.len(), ..Verified::default() };
    for (i, answer) in again.answers {
        match &answer.fault {
            Some(fault) => verified.failed.push(fault.to_string()),
            None if answer.text == asked[i].1.text => verified.same += 1,
            None => verified.different.push(asked[i].0),
        }
    }
    Ok(verified)
}

fn fresh_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // Short enough for every reader of JSON.
    (now.as_nanos() as u64 ^ u64::from(std::process::id()) << 32) & 0xFFFF_FFFF
}
