//! `marlin serve`: an OpenAI-compatible server.

mod log;
mod models;
mod tls;
mod traces;

use crate::args::serve::Serve;
use crate::{console, exit};
use anyhow::{Context, Result, anyhow};
use marlin_server::{
    Config, Exporter, Key, Keys, KvEvents, Listening, MODEL_IN_TOPIC, ModelLimits, Models,
    Publishing, QueueLimits, Quota, RequestLimits, Server,
};
use marlin_text::GrammarLimits;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;

/// How often a file of keys is looked at.
const KEYS_EVERY: Duration = Duration::from_secs(2);
/// Time for the last traces to get to their collector.
const FLUSH: Duration = Duration::from_secs(3);

/// Serves until it is told to stop.
pub fn run(args: &Serve) -> Result<ExitCode> {
    log::start(args.log_format);
    let keys = keys(args)?;
    if keys.is_none() && !args.host.is_loopback() {
        console::note(
            "warning: everybody who can reach this address can use the server; --api-key sets a key",
        );
    }
    let quota =
        Quota { per_minute: args.rate_limit, concurrent: args.max_concurrent.map(|n| n as usize) };
    let keys = Keys::new(keys, quota);
    let (names, loader) = models::of(args)?;
    let (events, publishing) = kv_events(args, names.len())?.unzip();
    let models = Models::new(names, Box::new(loader), args.model_memory, model_limits(args));
    let models = match events {
        Some(events) => models.telling(events),
        None => models,
    };
    let (tracer, exporter) = traces::of(args)?.unzip();
    let config = Config { tracer, ..config(args) };
    let server = Server::new(Arc::new(models), config, keys);
    // Requests are few and small beside the work on them: two threads, which mostly sleep.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(serve(args, server, publishing, exporter));
    // Threads that load or read a text may still be at work; nobody waits for them any more.
    runtime.shutdown_background();
    result
}

async fn serve(
    args: &Serve,
    server: Arc<Server>,
    publishing: Option<Publishing>,
    exporter: Option<Exporter>,
) -> Result<ExitCode> {
    let tls = match (&args.tls_cert, &args.tls_key) {
        (Some(cert), Some(key)) => Some(tls::config(cert, key)?),
        _ => None,
    };
    let scheme = if tls.is_some() { "https" } else { "http" };
    let address = SocketAddr::new(args.host, args.port);
    let listening = Listening::bind(server.clone(), address, tls).await;
    let listening = listening.with_context(|| format!("cannot listen at {address}"))?;
    let address = listening.address()?;
    let (stop, stopped) = watch::channel(0);
    signals(stop)?;
    if let Some(file) = args.api_key_file.clone() {
        tokio::spawn(reload_keys(server.clone(), file, args.api_key.clone()));
    }
    if let Some(events) = server.models.kv_events() {
        console::note(&format!("cache events: tcp://{}", events.address()));
    }
    if let Some(publishing) = publishing {
        tokio::spawn(async move {
            if let Err(error) = publishing.run().await {
                tracing::error!(%error, "no cache events are sent");
            }
        });
    }
    let (flush, flushed) = watch::channel(false);
    let exporting = exporter.map(|exporter| tokio::spawn(exporter.run(flushed)));
    let running = tokio::spawn(listening.run(stopped.clone()));
    let mut early = stopped;
    let served = tokio::select! {
        served = server.models.load_default() => served.map_err(|error| anyhow!(error.message))?,
        _ = early.wait_for(|told| *told > 0) => return Ok(ExitCode::SUCCESS),
    };
    let context = served.runtime.limits().max_context;
    let (id, device) = (&served.id, &served.device);
    let about = format!("{id} on {device}, {context} tokens of context");
    console::note(&format!("ready: {scheme}://{address} ({about})"));
    drop(served);
    running.await?;
    if let Some(exporting) = exporting {
        let _ = flush.send(true);
        let _ = tokio::time::timeout(FLUSH, exporting).await;
    }
    Ok(ExitCode::SUCCESS)
}

fn config(args: &Serve) -> Config {
    let mut hosts = Vec::new();
    if args.host.is_loopback() {
        // A name that points here would let any web page reach a server without a key.
        hosts.extend(["localhost", "127.0.0.1", "[::1]"].map(str::to_owned));
        hosts.push(args.host.to_string());
        hosts.extend(args.allowed_host.iter().cloned());
    } else if !args.allowed_host.is_empty() {
        hosts.push(args.host.to_string());
        hosts.extend(args.allowed_host.iter().cloned());
    }
    let limits = &args.limits;
    Config {
        max_body_bytes: usize::try_from(args.max_body).unwrap_or(usize::MAX),
        header_timeout: Duration::from_secs(args.header_timeout),
        body_timeout: Duration::from_secs(args.body_timeout),
        keep_alive: Duration::from_secs(args.keep_alive),
        drain: Duration::from_secs(args.drain),
        max_connections: args.max_connections as usize,
        cors: args.cors_origin.clone(),
        hosts,
        page: !args.no_page,
        tracer: None,
        max_head_bytes: usize::try_from(limits.max_head).unwrap_or(usize::MAX),
        max_header_fields: limits.max_headers.into(),
        idle_timeout: Duration::from_secs(limits.idle_timeout),
        max_readers: limits.max_readers,
        limits: RequestLimits {
            answers: limits.max_answers,
            prompts: limits.max_prompts,
            stops: limits.max_stops,
            stop_bytes: limits.max_stop_bytes,
            biases: limits.max_biases,
            top_logprobs: limits.max_top_logprobs,
            messages: limits.max_messages,
            tools: limits.max_tools,
            inputs: limits.max_inputs,
            schema_depth: limits.schema_depth.into(),
            schema_values: limits.schema_values,
        },
    }
}

fn model_limits(args: &Serve) -> ModelLimits {
    let limits = &args.limits;
    ModelLimits {
        queue: QueueLimits { answers: args.queue, pools: limits.queue_caches },
        grammars: GrammarLimits {
            max_depth: limits.schema_depth.into(),
            max_nodes: limits.schema_values,
            compile_time: Duration::from_millis(limits.grammar_time),
            max_compiling: limits.max_grammars.into(),
            ..GrammarLimits::default()
        },
        template_time: Duration::from_millis(limits.template_time),
    }
}

/// What tells of the caches, where that is asked for.
fn kv_events(args: &Serve, models: usize) -> Result<Option<(KvEvents, Publishing)>> {
    let Some(address) = args.kv_events else { return Ok(None) };
    if args.no_prefix_cache {
        return Err(exit::usage("--kv-events tells of the cache that --no-prefix-cache turns off"));
    }
    if models > 1 && !args.kv_events_topic.contains(MODEL_IN_TOPIC) {
        let message = format!(
            "--kv-events of several models: --kv-events-topic must contain {MODEL_IN_TOPIC}, or nobody can tell whose they are"
        );
        return Err(exit::usage(message));
    }
    if !address.ip().is_loopback() {
        console::note(
            "warning: everybody who can reach the address of --kv-events can read the tokens of prompts",
        );
    }
    let bound = KvEvents::bind(address, &args.kv_events_topic);
    Ok(Some(bound.with_context(|| format!("cannot listen at tcp://{address}"))?))
}

fn keys(args: &Serve) -> Result<Option<Vec<Key>>> {
    let given = given(&args.api_key)?;
    match &args.api_key_file {
        Some(file) => Ok(Some([given, read_keys(file)?].concat())),
        None if given.is_empty() => Ok(None),
        None => Ok(Some(given)),
    }
}

fn given(keys: &[String]) -> Result<Vec<Key>> {
    let key = |(i, secret): (usize, &String)| {
        let name = format!("given-{}", i + 1);
        Key::new(name, secret).map_err(|error| exit::usage(format!("--api-key: {error}")))
    };
    keys.iter().enumerate().map(key).collect()
}

fn read_keys(file: &Path) -> Result<Vec<Key>> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    Key::parse_all(&text).map_err(|error| exit::usage(format!("{}: {error}", file.display())))
}

async fn reload_keys(server: Arc<Server>, file: std::path::PathBuf, more: Vec<String>) {
    let changed = |file: &Path| std::fs::metadata(file).and_then(|m| m.modified()).ok();
    let mut seen: Option<SystemTime> = changed(&file);
    loop {
        tokio::time::sleep(KEYS_EVERY).await;
        let now = changed(&file);
        if now == seen {
            continue;
        }
        seen = now;
        match read_keys(&file).and_then(|keys| Ok([given(&more)?, keys].concat())) {
            Ok(keys) => {
                tracing::info!(keys = keys.len(), "keys read again");
                server.keys.replace(keys);
            }
            Err(error) => tracing::error!(%error, "the keys stay as they were"),
        }
    }
}

/// Counts the words to stop: SIGTERM and Ctrl-C.
fn signals(stop: watch::Sender<u32>) -> Result<()> {
    let begin = crate::interrupt::begin();
    #[cfg(unix)]
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    #[cfg(unix)]
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let _ = begin;
    tokio::spawn(async move {
        loop {
            #[cfg(unix)]
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            #[cfg(not(unix))]
            if tokio::signal::ctrl_c().await.is_err() {
                return;
            }
            stop.send_modify(|told| *told += 1);
            if *stop.borrow() == 1 {
                console::note("stopping: answers under way may end; once more stops at once");
            }
        }
    });
    Ok(())
}
