//! `marlin launch`: points coding agents at a server of ours.

mod agents;

use crate::args::{Launch, Shell};
use crate::{console, exit};
use agents::{AGENTS, Agent};
use anyhow::Result;
use serde::Serialize;
use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, ExitCode};

/// What agents send to a server without keys: they insist on one.
const ANY_KEY: &str = "local";
/// Tokens of prompt and answer together, when not told: what `marlin` allows when it is not told either.
const CONTEXT: u32 = 8192;

/// An agent's settings for one server.
#[derive(Debug, Serialize)]
struct Settings {
    agent: &'static str,
    endpoint: &'static str,
    variables: Vec<(&'static str, String)>,
    unset: &'static [&'static str],
    arguments: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<File>,
    source: &'static str,
}

#[derive(Debug, Serialize)]
struct File {
    path: &'static str,
    contents: String,
}

/// Prints the settings of an agent, runs a command with them, or lists agents.
pub fn run(args: &Launch) -> Result<ExitCode> {
    let Some(name) = &args.agent else {
        list(args)?;
        return Ok(ExitCode::SUCCESS);
    };
    let agent = AGENTS.iter().find(|agent| agent.name == name).ok_or_else(|| {
        let names: Vec<&str> = AGENTS.iter().map(|agent| agent.name).collect();
        exit::usage(format!(
            "{name} is not known; expected one of {}. openai and anthropic fit most other programs",
            names.join(", ")
        ))
    })?;
    let settings = settings(agent, args)?;
    if args.command.is_empty() {
        print(agent, &settings, args)?;
        return Ok(ExitCode::SUCCESS);
    }
    launch(agent, &settings, &args.command)
}

fn list(args: &Launch) -> Result<()> {
    if args.json {
        let rows: Vec<_> = AGENTS.iter().map(|agent| serde_json::json!({"agent": agent.name, "about": agent.about, "endpoint": agent.endpoint})).collect();
        return console::json(&rows);
    }
    for agent in AGENTS {
        console::line(&format!("{:<10} {:<42} {}", agent.name, agent.about, agent.endpoint))?;
    }
    console::note("marlin launch AGENT prints what points it at a server.");
    Ok(())
}

/// Address of a server without the slash at its end and without `/v1`.
fn root(url: &str) -> Result<String> {
    let bad = |why: &str| exit::usage(format!("--url {url}: {why}"));
    let Some((scheme, rest)) = url.split_once("://") else {
        return Err(bad("expected http://HOST:PORT"));
    };
    if !["http", "https"].contains(&scheme) || rest.is_empty() || rest.starts_with('/') {
        return Err(bad("expected http://HOST:PORT"));
    }
    let root = url.trim_end_matches('/');
    Ok(root.strip_suffix("/v1").unwrap_or(root).to_owned())
}

fn settings(agent: &'static Agent, args: &Launch) -> Result<Settings> {
    let root = root(&args.url)?;
    let key = args.api_key.as_deref().unwrap_or(ANY_KEY);
    // They go into JSON, TOML, YAML and shells, where these would end a text or begin something else.
    for (option, value) in [("--url", root.as_str()), ("--model", &args.model), ("--api-key", key)]
    {
        if value.is_empty() {
            return Err(exit::usage(format!("{option} is empty")));
        }
        if let Some(odd) = value.chars().find(|c| !c.is_ascii_graphic() || "\"'\\`${}".contains(*c))
        {
            return Err(exit::usage(format!("{option}: {odd:?} cannot be passed on")));
        }
    }
    let context = args.context.unwrap_or(CONTEXT);
    let values = [
        ("{v1}", format!("{root}/v1")),
        ("{root}", root),
        ("{model}", args.model.clone()),
        ("{key}", key.to_owned()),
        ("{context}", context.to_string()),
        ("{answer}", (context / 4).max(1).to_string()),
    ];
    let fill = |text: &str| {
        values.iter().fold(text.to_owned(), |text, (name, value)| text.replace(name, value))
    };
    Ok(Settings {
        agent: agent.name,
        endpoint: agent.endpoint,
        variables: agent.variables.iter().map(|(name, value)| (*name, fill(value))).collect(),
        unset: agent.unset,
        arguments: agent.arguments.iter().map(|argument| fill(argument)).collect(),
        file: agent.file.map(|(path, contents)| File { path, contents: fill(contents) }),
        source: agent.source,
    })
}

/// Lines that a shell can evaluate; what it cannot is a comment.
fn print(agent: &Agent, settings: &Settings, args: &Launch) -> Result<()> {
    if args.json {
        let mut document = serde_json::to_value(settings)?;
        document["variables"] = settings
            .variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.as_str().into()))
            .collect::<serde_json::Map<_, _>>()
            .into();
        return console::json(&document);
    }
    for name in settings.unset {
        console::line(&match args.shell {
            Shell::Sh => format!("unset {name}"),
            Shell::Fish => format!("set -e {name}"),
            Shell::Powershell => format!("Remove-Item Env:{name} -ErrorAction SilentlyContinue"),
        })?;
    }
    for (name, value) in &settings.variables {
        // No value has a single quote.
        console::line(&match args.shell {
            Shell::Sh => format!("export {name}='{value}'"),
            Shell::Fish => format!("set -gx {name} '{value}'"),
            Shell::Powershell => format!("$env:{name} = '{value}'"),
        })?;
    }
    if let Some(File { path, contents }) = &settings.file {
        let or = if settings.arguments.is_empty() { "" } else { ", or the arguments below" };
        console::line(&format!("# {path}{or}:"))?;
        contents.lines().try_for_each(|line| console::line(format!("#   {line}").trim_end()))?;
    }
    if !agent.program.is_empty() {
        let arguments: Vec<String> =
            settings.arguments.iter().map(|argument| quoted(argument)).collect();
        console::line(format!("# {} {}", agent.program, arguments.join(" ")).trim_end())?;
    }
    console::note(&format!("It asks for {}. Read in {}.", settings.endpoint, settings.source));
    Ok(())
}

fn quoted(argument: &str) -> String {
    let plain = argument.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./:=".contains(&b));
    if plain { argument.to_owned() } else { format!("'{argument}'") }
}

/// Runs a command with the settings. The agent's own command gets the arguments it needs.
fn launch(agent: &Agent, settings: &Settings, command: &[OsString]) -> Result<ExitCode> {
    let (program, rest) =
        command.split_first().ok_or_else(|| exit::usage("expected a command after --"))?;
    let is_agent = Path::new(program).file_stem().is_some_and(|stem| stem == agent.program);
    if let Some(File { path, .. }) =
        settings.file.as_ref().filter(|_| settings.arguments.is_empty())
    {
        let name = agent.name;
        return Err(exit::usage(format!(
            "{name} reads {path} only; marlin launch {name} prints what to put there"
        )));
    }
    let mut child = Command::new(program);
    if is_agent {
        child.args(&settings.arguments);
    }
    child.args(rest).envs(settings.variables.iter().map(|(name, value)| (name, value)));
    settings.unset.iter().for_each(|name| {
        child.env_remove(name);
    });
    let failed = |error: std::io::Error| {
        let code = if error.kind() == std::io::ErrorKind::NotFound {
            exit::NOT_FOUND
        } else {
            exit::FAILED
        };
        exit::coded(code, format!("{}: {error}; is it installed?", program.to_string_lossy()))
    };
    replace(child).map_err(failed)
}

/// The command takes this program's place, so that signals and the terminal are its own.
#[cfg(unix)]
fn replace(mut child: Command) -> std::io::Result<ExitCode> {
    use std::os::unix::process::CommandExt;
    Err(child.exec())
}

#[cfg(not(unix))]
fn replace(mut child: Command) -> std::io::Result<ExitCode> {
    let code = child.status()?.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(exit::FAILED)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn parsed(arguments: &[&str]) -> Launch {
        let cli =
            crate::args::Cli::try_parse_from([&["marlin", "launch"], arguments].concat()).unwrap();
        match cli.command {
            crate::args::Command::Launch(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_row_is_whole() {
        assert!(AGENTS.is_sorted_by_key(|agent| agent.name));
        let args = parsed(&[
            "--url",
            "https://host:1/a/v1/",
            "--model",
            "org/name-4b:q4",
            "--api-key",
            "k+/=",
            "--context",
            "4096",
            "x",
        ]);
        for agent in AGENTS {
            let settings = settings(agent, &args).unwrap();
            let file = settings.file.as_ref().map_or("", |file| file.contents.as_str());
            let all = [
                settings
                    .variables
                    .iter()
                    .map(|(_, value)| value.as_str())
                    .collect::<Vec<_>>()
                    .join("\n"),
                settings.arguments.join("\n"),
                file.to_owned(),
            ]
            .join("\n");
            let name = agent.name;
            assert!(all.contains("https://host:1/a"), "{name} is not pointed at the server: {all}");
            assert!(!all.contains("/v1/v1") && !all.contains("//v1"), "{name}: {all}");
            for template in ["{v1}", "{root}", "{model}", "{key}", "{context}", "{answer}"] {
                assert!(!all.contains(template), "{name}: {all}");
            }
            assert!(!all.contains('\''), "{name}: a shell could not quote {all}");
            assert!(
                !settings.source.is_empty()
                    && (!agent.variables.is_empty() || agent.file.is_some()),
                "{name}"
            );
        }
    }

    #[test]
    fn what_agents_parse_can_be_parsed() {
        let args = parsed(&["--model", "org/name", "x"]);
        let of = |name: &str| {
            settings(AGENTS.iter().find(|agent| agent.name == name).unwrap(), &args).unwrap()
        };
        let opencode: serde_json::Value =
            serde_json::from_str(&of("opencode").file.unwrap().contents).unwrap();
        let provider = &opencode["provider"]["marlin"];
        assert_eq!(provider["options"]["baseURL"], "http://127.0.0.1:8080/v1");
        assert_eq!(provider["models"]["org/name"]["limit"]["context"], 8192);
        assert_eq!(opencode["model"], "marlin/org/name");
        let crush: serde_json::Value =
            serde_json::from_str(&of("crush").file.unwrap().contents).unwrap();
        assert_eq!(crush["providers"]["marlin"]["models"][0]["default_max_tokens"], 2048);
    }

    #[test]
    fn addresses_are_cut_to_the_root() {
        for (url, expected) in [
            ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
            ("http://localhost:8080/v1/", "http://localhost:8080"),
            ("https://host/marlin/v1", "https://host/marlin"),
        ] {
            assert_eq!(root(url).unwrap(), expected);
        }
        for url in ["127.0.0.1:8080", "ftp://host", "http://", "http:///v1"] {
            assert!(root(url).unwrap_err().to_string().contains("http://HOST:PORT"), "{url}");
        }
    }
}
