//! Settings of `serve` from three places: the command line, the environment, and `marlin.toml`, each before the next.
//!
//! A line of the file becomes the option of its name, unless the command line or the environment has
//! it already; so the file knows what the command line knows, and is checked by the same rules.

use crate::args::Cli;
use crate::{console, exit};
use anyhow::{Context, Result};
use clap::parser::ValueSource;
use clap::{ArgMatches, Command, CommandFactory};
use serde_json::{Map, Value, json};
use std::ffi::OsString;
use std::path::PathBuf;

/// Name of the file.
const FILE: &str = "marlin.toml";
/// The table in it.
const TABLE: &str = "serve";

/// The arguments of this process, with those of the settings file where they are settings of `serve`.
///
/// # Errors
/// When the file cannot be read, or has a line that is no setting.
pub fn arguments() -> Result<Vec<OsString>> {
    let mut given: Vec<OsString> = std::env::args_os().collect();
    let command = Cli::command();
    // What is wrong with them is told when they are parsed for good.
    let Ok(matches) = command.clone().try_get_matches_from(&given) else { return Ok(given) };
    let Some((serve, matches)) = serve(&command, &matches) else { return Ok(given) };
    let environment = from_environment(serve, matches);
    let named = |argument: &str| environment.iter().any(|from| from.id == argument);
    given.extend(from_file(serve, matches, &named)?);
    given.extend(environment.into_iter().map(|from| from.option));
    Ok(given)
}

/// The verb that takes settings, and what it was given.
fn serve<'a>(
    command: &'a Command,
    matches: &'a ArgMatches,
) -> Option<(&'a Command, &'a ArgMatches)> {
    match matches.subcommand()? {
        (TABLE, matches) => Some((command.find_subcommand(TABLE)?, matches)),
        ("config", matches) => {
            let show = command.find_subcommand("config")?.find_subcommand("show")?;
            Some((show, matches.subcommand_matches("show")?))
        }
        _ => None,
    }
}

/// The settings file: the one that was named, or the first that is there.
fn file(matches: &ArgMatches) -> Option<PathBuf> {
    if let Some(path) = matches.get_one::<PathBuf>("config") {
        return Some(path.clone());
    }
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = var("XDG_CONFIG_HOME").or_else(|| Some(var("HOME")?.join(".config")));
    let candidates = [Some(PathBuf::from(FILE)), home.map(|home| home.join("marlin").join(FILE))];
    candidates.into_iter().flatten().find(|path| path.is_file())
}

/// Variable of an option.
fn variable(long: &str) -> String {
    format!("MARLIN_{}", long.replace('-', "_").to_uppercase())
}

/// Variables that other programs know, too, and the option that each is where ours is not set.
const ELSEWHERE: [(&str, &str); 2] = [
    ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "otlp-endpoint"),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "otlp-endpoint"),
];

/// An option that comes from a variable.
struct FromEnvironment {
    id: String,
    variable: String,
    option: OsString,
}

/// Options for variables that the command line does not know: ours for what is shared with other verbs, which do not
/// read them, and those of others.
fn from_environment(command: &Command, matches: &ArgMatches) -> Vec<FromEnvironment> {
    let option = |argument: &clap::Arg| {
        let (id, long) = (argument.get_id().as_str(), argument.get_long()?);
        let given = matches.value_source(id);
        if matches!(given, Some(ValueSource::CommandLine | ValueSource::EnvVariable)) {
            return None;
        }
        let own = argument.get_env().is_none().then(|| variable(long));
        let others = ELSEWHERE.iter().filter(|(_, option)| *option == long);
        let names = own.into_iter().chain(others.map(|(name, _)| (*name).to_owned()));
        let set = |name: String| {
            let value = std::env::var(&name).ok().filter(|value| !value.is_empty())?;
            Some((name, value))
        };
        let (variable, value) = names.into_iter().find_map(set)?;
        let option = format!("--{long}={value}").into();
        Some(FromEnvironment { id: id.to_owned(), variable, option })
    };
    command.get_arguments().filter(|a| a.get_action().takes_values()).filter_map(option).collect()
}

/// Options for the lines of the file that count.
fn from_file(
    command: &Command,
    matches: &ArgMatches,
    named: &dyn Fn(&str) -> bool,
) -> Result<Vec<OsString>> {
    let Some(path) = file(matches) else { return Ok(Vec::new()) };
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let wrong = |message: String| exit::usage(format!("{}: {message}", path.display()));
    let table: toml::Table =
        text.parse().map_err(|error: toml::de::Error| wrong(error.to_string()))?;
    if let Some(key) = table.keys().find(|key| *key != TABLE) {
        return Err(wrong(format!("{key}: settings stand below [{TABLE}]")));
    }
    let mut options = Vec::new();
    let settings = match table.get(TABLE) {
        None => return Ok(options),
        Some(toml::Value::Table(settings)) => settings,
        Some(_) => return Err(wrong(format!("{TABLE}: settings stand below [{TABLE}]"))),
    };
    for (key, value) in settings {
        let known = command.get_arguments().find(|a| a.get_long() == Some(&key.replace('_', "-")));
        let Some(argument) = known.filter(|a| a.get_id() != "config" && a.get_id() != "help")
        else {
            return Err(wrong(format!("{key} is no setting; `marlin config show` lists them")));
        };
        let id = argument.get_id().as_str();
        let source = matches.value_source(id);
        if named(id) || matches!(source, Some(ValueSource::CommandLine | ValueSource::EnvVariable))
        {
            continue;
        }
        let long = argument.get_long().unwrap_or_default();
        let values = match value {
            toml::Value::Array(values) => values.iter().collect(),
            value => vec![value],
        };
        for value in values {
            let takes_value = argument.get_action().takes_values();
            options.push(match value {
                toml::Value::Boolean(true) if !takes_value => format!("--{long}").into(),
                toml::Value::Boolean(false) if !takes_value => continue,
                toml::Value::String(text) if takes_value => format!("--{long}={text}").into(),
                toml::Value::Integer(number) if takes_value => format!("--{long}={number}").into(),
                toml::Value::Float(number) if takes_value => format!("--{long}={number}").into(),
                other => return Err(wrong(format!("{key}: {other} does not fit --{long}"))),
            });
        }
    }
    Ok(options)
}

/// Prints every setting that has a value.
///
/// # Errors
/// When stdout is closed.
pub fn show(origins: bool, as_json: bool) -> Result<()> {
    let given: Vec<OsString> = std::env::args_os().collect();
    let command = Cli::command();
    let first = command.clone().get_matches_from(&given);
    let all = command.clone().get_matches_from(arguments()?);
    let (Some((serve_command, all)), Some((_, first))) =
        (serve(&command, &all), serve(&command, &first))
    else {
        return Ok(());
    };
    let environment = from_environment(serve_command, first);
    let named = |id: &str| {
        let from = environment.iter().find(|from| from.id == id);
        from.map(|from| from.variable.clone())
    };
    let path = file(first).map(|path| path.display().to_string()).unwrap_or_default();
    let mut document = Map::new();
    for argument in serve_command.get_arguments() {
        let id = argument.get_id().as_str();
        let own = ["origin", "json", "config", "help", "verbose", "quiet"];
        let Some(long) = argument.get_long().filter(|_| !own.contains(&id)) else { continue };
        let Some(values) = all.get_raw(id) else { continue };
        let secret = argument.is_hide_env_values_set();
        let shown = |value: &std::ffi::OsStr| match secret {
            true => "(hidden)".to_owned(),
            false => value.to_string_lossy().into_owned(),
        };
        let values: Vec<String> = values.map(shown).collect();
        let origin = match first.value_source(id) {
            Some(ValueSource::CommandLine) => "command line".to_owned(),
            Some(ValueSource::EnvVariable) => variable(long),
            _ if named(id).is_some() => named(id).unwrap_or_default(),
            _ if all.value_source(id) == Some(ValueSource::CommandLine) => path.clone(),
            _ => "default".to_owned(),
        };
        let value = values.join(",");
        if as_json {
            let entry =
                if origins { json!({"value": value, "origin": origin}) } else { json!(value) };
            document.insert(long.to_owned(), entry);
        } else if origins {
            console::line(&format!("{long} = {value}  # {origin}"))?;
        } else {
            console::line(&format!("{long} = {value}"))?;
        }
    }
    if as_json {
        console::json(&Value::Object(document))?;
    }
    Ok(())
}
