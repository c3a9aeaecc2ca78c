//! Traces, and the variables that say where they go: those of OpenTelemetry's specification.

use crate::args::serve::Serve;
use crate::{console, exit};
use anyhow::Result;
use marlin_server::{Exporter, Tracer};

/// What takes traces and what sends them, where a collector is named.
pub fn of(args: &Serve) -> Result<Option<(Tracer, Exporter)>> {
    let Some(endpoint) = &args.otlp_endpoint else { return Ok(None) };
    if variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        console::note("no traces are exported: OTEL_SDK_DISABLED is set");
        return Ok(None);
    }
    let protocols = ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"];
    if let Some(protocol) = protocols.into_iter().find_map(variable)
        && protocol == "grpc"
    {
        let message = "traces are exported over HTTP only; OTEL_EXPORTER_OTLP_PROTOCOL is grpc: set it to http/json, and the port of the collector for it, usually 4318";
        return Err(exit::usage(message));
    }
    let headers = ["OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS"];
    let headers = headers.into_iter().find_map(variable).unwrap_or_default();
    let headers = pairs("OTEL_EXPORTER_OTLP_HEADERS", &headers)?;
    let resource = variable("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
    let mut resource = pairs("OTEL_RESOURCE_ATTRIBUTES", &resource)?;
    if let Some(name) = variable("OTEL_SERVICE_NAME") {
        resource.push(("service.name".to_owned(), name));
    }
    let (tracer, records) = Tracer::new();
    let exporter = Exporter::new(endpoint, &headers, &resource, records).map_err(exit::usage)?;
    Ok(Some((tracer, exporter)))
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// `name=value,name=value`, the values with `%` and two digits for what they cannot hold.
fn pairs(variable: &str, text: &str) -> Result<Vec<(String, String)>> {
    let wrong = |part: &str| {
        // What stands there may be a secret.
        let name = part.split('=').next().unwrap_or_default();
        exit::usage(format!("{variable}: expected name=value,name=value; see {name:?}"))
    };
    let pair = |part: &str| {
        let (name, value) = part.split_once('=').ok_or_else(|| wrong(part))?;
        let value = decoded(value.trim()).ok_or_else(|| wrong(part))?;
        Ok((name.trim().to_owned(), value))
    };
    text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(pair).collect()
}

fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2)?;
        rest = after;
        let digits = str::from_utf8(digits).ok()?;
        let plain = digits.bytes().all(|b| b.is_ascii_hexdigit());
        bytes.push(u8::from_str_radix(digits, 16).ok().filter(|_| plain)?);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_read_as_the_specification_has_them() {
        let found = pairs("V", " a=b , authorization=Basic%20eA==,,c= ").unwrap();
        let expected = [("a", "b"), ("authorization", "Basic eA=="), ("c", "")];
        let owned = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(found, owned);
        for wrong in ["a", "a=%", "a=%2", "a=%zz", "a=%+1", "a=%ff"] {
            let said = pairs("V", wrong).unwrap_err().to_string();
            assert!(said.contains("\"a\""), "{wrong}: {said}");
        }
    }
}
