//! What requests get: fields, shapes, errors.

mod common;

use common::{Setup, read};
use marlin_server::{Config, Key, Quota};
use serde_json::{Value, json};

fn chat(text: &str) -> Value {
    json!({"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0})
}

fn with(mut body: Value, more: Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

#[test]
fn a_stream_says_what_a_whole_answer_says() {
    let server = Setup::default().start();
    let whole = server.post("/v1/chat/completions", &chat("Tell me"));
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(!text.is_empty());
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 8);
    assert_eq!(whole["object"], "chat.completion");
    let more = json!({"stream": true, "stream_options": {"include_usage": true}});
    let stream = server.post("/v1/chat/completions", &with(chat("Tell me"), more));
    assert_eq!(stream.headers["content-type"], "text/event-stream; charset=utf-8");
    assert_eq!(stream.streamed()[&0], (text.to_owned(), "length".to_owned()));
    let events = stream.events();
    let last: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 8);
    let ids: std::collections::BTreeSet<String> = events[..events.len() - 1]
        .iter()
        .map(|e| serde_json::from_str::<Value>(e).unwrap()["id"].to_string())
        .collect();
    assert_eq!(ids.len(), 1, "one id for all chunks");
}

#[test]
fn several_answers_share_the_prompt() {
    let server = Setup::default().start();
    let before = server.behaviour.rows.load(std::sync::atomic::Ordering::Relaxed);
    let long = "word ".repeat(150);
    let body = with(chat(&long), json!({"n": 4, "temperature": 1.0, "seed": 5}));
    let response = server.post("/v1/chat/completions", &body).json();
    let choices = response["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    let prompt = response["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    assert_eq!(response["usage"]["completion_tokens"], 32);
    let rows = server.behaviour.rows.load(std::sync::atomic::Ordering::Relaxed) - before;
    assert!(rows <= prompt + 32, "{rows} rows for a prompt of {prompt} and 4 answers of 8");
    let again = server.post("/v1/chat/completions", &body).json();
    assert_eq!(again["choices"], response["choices"], "the same seed, the same answers");
    let cached = &again["usage"]["prompt_tokens_details"]["cached_tokens"];
    assert!(cached.as_u64().unwrap() as usize >= prompt - 16, "{cached} of {prompt} were known");
}

#[test]
fn stop_strings_end_an_answer_and_never_show() {
    let server = Setup::default().start();
    let whole =
        server.post("/v1/chat/completions", &with(chat("Go"), json!({"max_tokens": 30}))).json();
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let middle: String = text.chars().skip(20).take(7).collect();
    let before = text.split(&middle).next().unwrap().to_owned();
    for stop in [json!(middle), json!(["never there", middle])] {
        let body = with(chat("Go"), json!({"max_tokens": 30, "stop": stop}));
        let cut = server.post("/v1/chat/completions", &body).json();
        assert_eq!(cut["choices"][0]["message"]["content"], json!(before));
        assert_eq!(cut["choices"][0]["finish_reason"], "stop");
        let stream = server.post("/v1/chat/completions", &with(body, json!({"stream": true})));
        assert_eq!(stream.streamed()[&0], (before.clone(), "stop".to_owned()));
    }
}

fn words() -> Value {
    json!({"type": "regex", "value": "(yes|no)"})
}

fn schema() -> Value {
    let schema = json!({"name": "a", "schema": {"type": "object"}});
    json!({"response_format": {"type": "json_schema", "json_schema": schema}})
}

fn required() -> Value {
    let function = json!({"name": "f", "parameters": {"type": "object"}});
    json!({"tools": [{"type": "function", "function": function}], "tool_choice": "required"})
}

/// A field that the other protocols refuse beside another must not be dropped there either.
#[test]
fn no_protocol_drops_a_field_beside_another() {
    let server = Setup::default().start();
    let function = json!({"type": "function", "name": "f", "parameters": {"type": "object"}});
    let format = json!({"format": {"type": "json_schema", "name": "a", "schema": {}}});
    let responses = json!({"input": "Go", "max_output_tokens": 4});
    let tool = json!({"name": "f", "input_schema": {"type": "object"}});
    let output = json!({"format": {"type": "json_schema", "schema": {"type": "object"}}});
    let obfuscated = json!({"stream": true, "stream_options": {"include_obfuscation": true}});
    let obfuscation = "stream_options.include_obfuscation";
    let forced = json!({"tools": [function], "tool_choice": "required"});
    let any = json!({"tools": [tool], "tool_choice": {"type": "any"}});
    for (path, body, more, param) in [
        ("/v1/responses", &responses, json!({"text": format, "grammar": words()}), "grammar"),
        ("/v1/responses", &responses, with(forced.clone(), json!({"text": format})), "tool_choice"),
        ("/v1/responses", &responses, with(forced, json!({"grammar": words()})), "tool_choice"),
        ("/v1/responses", &responses, obfuscated.clone(), obfuscation),
        (
            "/v1/responses",
            &responses,
            json!({"prompt_cache_retention": "24h"}),
            "prompt_cache_retention",
        ),
        (
            "/v1/messages",
            &chat("Go"),
            with(any.clone(), json!({"output_config": output})),
            "tool_choice",
        ),
        ("/v1/messages", &chat("Go"), with(any, json!({"grammar": words()})), "tool_choice"),
        (
            "/v1/messages",
            &chat("Go"),
            json!({"output_config": output, "grammar": words()}),
            "grammar",
        ),
        ("/v1/completions", &json!({"prompt": "Go"}), obfuscated, obfuscation),
    ] {
        let response = server.post(path, &with(body.clone(), more.clone()));
        assert_eq!(response.status, 400, "{path} {more}: {}", response.body);
        let error = &response.json()["error"];
        assert!(error["message"].as_str().unwrap().contains(param), "{path} {more}: {error}");
        assert!(path == "/v1/messages" || error["param"] == param, "{path} {more}: {error}");
    }
    let kept = with(responses, json!({"prompt_cache_retention": "in_memory"}));
    assert_eq!(server.post("/v1/responses", &kept).status, 200);
}

#[test]
fn every_field_is_honoured_or_refused_by_name() {
    let server = Setup::default().start();
    let accepted = [
        json!({"temperature": null, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": -3}),
        json!({"presence_penalty": 1, "frequency_penalty": -1.5, "repetition_penalty": 1.1}),
        json!({"logit_bias": {"300": 5}, "user": "ann", "metadata": {"a": "b"}, "store": false}),
        json!({"stop": null, "n": 2, "min_tokens": 4, "ignore_eos": true, "priority": -1}),
        json!({"logprobs": true, "top_logprobs": 3, "max_completion_tokens": 5, "max_tokens": null}),
        json!({"response_format": {"type": "text"}, "tools": [], "tool_choice": "auto"}),
        json!({"stream": false, "service_tier": "auto", "modalities": ["text"], "timeout": 60}),
        json!({"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}]}, {"role": "user", "content": "b", "name": "ann"}]}),
        json!({"model": "default", "prompt_cache_retention": "in_memory"}),
        json!({"model": "first", "chat_template_kwargs": {"enable_thinking": false}, "cache_salt": "x"}),
    ];
    for more in accepted {
        let response = server.post("/v1/chat/completions", &with(chat("Hello"), more.clone()));
        assert_eq!(response.status, 200, "{more}: {}", response.body);
    }
    let refused = [
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"top_p": 1.5}), "top_p"),
        (json!({"n": 0}), "n"),
        (json!({"n": 17}), "n"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 1.5}), "max_tokens"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
        (json!({"stop": [1]}), "stop"),
        (json!({"stop": ""}), "stop"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"logit_bias": {"99999999": 1}}), "logit_bias"),
        (json!({"logit_bias": {"3": 1000}}), "logit_bias"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"stop_token_ids": [4_000_000_000u32]}), "stop_token_ids"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"seed": 1.5}), "seed"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "hello"}), "messages"),
        (json!({"messages": [{"content": "hello"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "wizard", "content": "hello"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": 3}]}), "messages[0].content"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0]",
        ),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), "messages[0].tool_call_id"),
        (
            json!({"messages": [{"role": "user", "content": "x", "mood": "good"}]}),
            "messages[0].mood",
        ),
        (json!({"response_format": {"type": "xml"}}), "response_format.type"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
        (json!({"tools": [{"type": "retrieval"}]}), "tools[0]"),
        (json!({"tools": [{"type": "function", "function": {}}]}), "tools[0]"),
        (
            json!({"tools": [{"type": "function", "function": {"name": "f", "mood": 1}}]}),
            "tools[0].function.mood",
        ),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"store": true}), "store"),
        (json!({"modalities": ["audio"]}), "modalities"),
        (json!({"functions": [{"name": "f"}]}), "functions"),
        (json!({"web_search_options": {"a": 1}}), "web_search_options"),
        (json!({"chat_template_kwargs": {"messages": 1}}), "chat_template_kwargs.messages"),
        (json!({"temprature": 1}), "temprature"),
        (json!({"reasoning_effort": "much"}), "reasoning_effort"),
        (json!({"cache_salt": ""}), "cache_salt"),
        (json!({"timeout": 0}), "timeout"),
        (with(schema(), json!({"grammar": words()})), "grammar"),
        (with(schema(), required()), "tool_choice"),
        (with(json!({"grammar": words()}), required()), "tool_choice"),
        (
            json!({"stream": true, "stream_options": {"include_obfuscation": true}}),
            "stream_options.include_obfuscation",
        ),
        (json!({"prompt_cache_retention": "24h"}), "prompt_cache_retention"),
    ];
    for (more, param) in refused {
        let response = server.post("/v1/chat/completions", &with(chat("Hello"), more.clone()));
        assert_eq!(response.status, 400, "{more}: {}", response.body);
        let error = &response.json()["error"];
        assert_eq!(error["param"], param, "{more}: {error}");
        assert!(
            error["message"].as_str().unwrap().contains(param.rsplit('.').next().unwrap()),
            "{error}"
        );
    }
}

#[test]
fn completions_take_texts_and_tokens() {
    let server = Setup::default().start();
    let body = json!({"prompt": "Once upon a time", "max_tokens": 6, "temperature": 0});
    let text = server.post("/v1/completions", &body).json();
    assert_eq!(text["object"], "text_completion");
    let answer = text["choices"][0]["text"].as_str().unwrap();
    let ids = server.post("/tokenize", &json!({"prompt": "Once upon a time"})).json();
    let body = with(body, json!({"prompt": ids["tokens"]}));
    let tokens = server.post("/v1/completions", &body).json();
    assert_eq!(tokens["choices"][0]["text"], answer);
    let echo = with(body.clone(), json!({"echo": true}));
    let echoed = server.post("/v1/completions", &echo).json();
    let echoed = echoed["choices"][0]["text"].as_str().unwrap();
    assert!(echoed.ends_with(answer) && echoed.contains("Once upon a time"), "{echoed}");
    let stream = server.post("/v1/completions", &with(echo, json!({"stream": true})));
    assert_eq!(stream.streamed()[&0].0, echoed);
    let several = json!({"prompt": ["a", "b", [300, 301]], "max_tokens": 2, "n": 2, "logprobs": 2});
    let several = server.post("/v1/completions", &several).json();
    assert_eq!(several["choices"].as_array().unwrap().len(), 6);
    assert_eq!(several["choices"][5]["index"], 5);
    let chances = &several["choices"][0]["logprobs"];
    assert_eq!(chances["tokens"].as_array().unwrap().len(), 2);
    assert_eq!(chances["top_logprobs"][0].as_object().unwrap().len(), 2);
    for (body, param) in [
        (json!({}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": [-1]}), "prompt"),
        (json!({"prompt": [4_000_000]}), "prompt"),
        (json!({"prompt": "a", "suffix": "b"}), "suffix"),
        (json!({"prompt": "a", "best_of": 3}), "best_of"),
        (json!({"prompt": "a", "echo": true, "logprobs": 1}), "echo"),
    ] {
        let response = server.post("/v1/completions", &body);
        assert_eq!(
            (response.status, &response.json()["error"]["param"]),
            (400, &json!(param)),
            "{body}"
        );
    }
}

/// The model's limit, the tokens of the prompt and those asked for, and the field that is too long.
#[test]
fn a_context_that_overflows_is_told_with_its_numbers() {
    let server = Setup::default().start();
    let (short, long) = ("Hi".to_owned(), "word ".repeat(2000));
    let (huge, endless) = ("word ".repeat(20_000), "word ".repeat(60_000));
    let count = |path: &str, text: &str| {
        let tokens = |body: Value| {
            server.post("/tokenize", &body).json()["count"].as_u64().unwrap() as usize
        };
        match path {
            "/v1/completions" => tokens(json!({"prompt": text})),
            _ => {
                tokens(chat(text).as_object().map(|c| json!({"messages": c["messages"]})).unwrap())
            }
        }
    };
    for text in [&short, &long, &huge, &endless] {
        for (path, field, most) in [
            ("/v1/chat/completions", "messages", "max_tokens"),
            ("/v1/completions", "prompt", "max_tokens"),
            ("/v1/responses", "input", "max_output_tokens"),
            ("/v1/messages", "messages", "max_tokens"),
        ] {
            let mut body = match field {
                "messages" => chat(text),
                field => json!({field: text}),
            };
            body[most] = json!(777);
            let response = server.post(path, &body);
            assert_eq!(response.status, 400, "{path}");
            let error = &response.json()["error"];
            let message = error["message"].as_str().unwrap();
            // What is far too long is not even made into tokens, and told by what it has at least.
            let prompt = match text.len() {
                bytes @ 100_000.. => bytes / 64,
                _ => count(path, text),
            };
            let numbers: Vec<&str> =
                message.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty()).collect();
            let near = |number: &&str| number.parse::<usize>().unwrap().abs_diff(prompt) < 2;
            assert!(numbers.iter().any(near), "{path}: no {prompt} in {message}");
            assert!(numbers.contains(&"512") && numbers.contains(&"777"), "{path}: {message}");
            if path != "/v1/messages" {
                assert_eq!(error["code"], "context_length_exceeded", "{path}");
                assert_eq!(error["param"], field, "{path}");
            }
        }
    }
    let embedded = server.post("/v1/embeddings", &json!({"input": long})).json();
    let error = &embedded["error"];
    assert_eq!(
        (&error["code"], &error["param"]),
        (&json!("context_length_exceeded"), &json!("input"))
    );
    let cut = with(chat(&long), json!({"truncate_prompt": true}));
    let response = server.post("/v1/chat/completions", &cut);
    assert_eq!(response.status, 200, "{}", response.body);
    assert_eq!(response.json()["usage"]["prompt_tokens"], 504);
}

#[test]
fn texts_to_tokens_vectors_and_perplexities() {
    let server = Setup::default().start();
    let tokens = server
        .post("/tokenize", &json!({"prompt": "A brave mouse", "return_token_strs": true}))
        .json();
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    assert_eq!(tokens["max_model_len"], 512);
    let text = server.post("/detokenize", &json!({"tokens": tokens["tokens"]})).json();
    assert!(text["prompt"].as_str().unwrap().contains("A brave mouse"));
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}]});
    let rendered = server.post("/apply-template", &chat).json();
    assert!(rendered["prompt"].as_str().unwrap().contains("Hi"));
    assert!(server.post("/tokenize", &chat).json()["count"].as_u64().unwrap() > 2);
    assert_eq!(server.post("/detokenize", &json!({"tokens": [9_999_999]})).status, 400);
    assert_eq!(server.post("/tokenize", &json!({})).status, 400);

    let vectors = server.post("/v1/embeddings", &json!({"input": ["a b c", [300, 301]]})).json();
    let vector = vectors["data"][1]["embedding"].as_array().unwrap();
    let length: f64 = vector.iter().map(|v| v.as_f64().unwrap().powi(2)).sum();
    assert!((length - 1.0).abs() < 1e-6);
    let coded = json!({"input": [300, 301], "encoding_format": "base64"});
    let coded = server.post("/v1/embeddings", &coded).json();
    assert_eq!(coded["data"][0]["embedding"].as_str().unwrap().len(), 12);
    for body in [
        json!({}),
        json!({"input": []}),
        json!({"input": ""}),
        json!({"input": "a", "dimensions": 3}),
    ] {
        assert_eq!(server.post("/v1/embeddings", &body).status, 400, "{body}");
    }

    let body = json!({"text": "a b c d e f", "include_token_logprobs": true});
    let scored = server.post("/v1/perplexity", &body).json();
    let tokens = scored["tokens"].as_u64().unwrap();
    assert_eq!(scored["token_logprobs"].as_array().unwrap().len() as u64, tokens);
    let (nll, perplexity) =
        (scored["nll"].as_f64().unwrap(), scored["perplexity"].as_f64().unwrap());
    assert!((nll.exp() - perplexity).abs() < 1e-9 * perplexity);
    assert_eq!(server.post("/v1/perplexity", &json!({"token_ids": [300]})).status, 400);
    assert_eq!(server.post("/v1/perplexity", &json!({"token_ids": vec![300; 600]})).status, 400);
    let stats = server.get("/v1/perplexity/stats").json();
    assert_eq!(stats["samples"], 1);
    assert_eq!(stats["median"], json!(perplexity));
    assert_eq!(server.metric("marlin:perplexity_samples_total"), 1.0);
}

#[test]
fn models_are_named_loaded_and_refused() {
    let server = Setup::default().start();
    let list = server.get("/v1/models").json();
    let status = |i: usize| list["data"][i]["status"].as_str().unwrap().to_owned();
    assert_eq!((status(0), status(1)), ("loaded".into(), "available".into()));
    assert_eq!(server.get("/v1/models/second").json()["id"], "second");
    assert_eq!(server.get("/v1/models/third").status, 404);
    let second = server.post("/v1/chat/completions", &with(chat("Hi"), json!({"model": "second"})));
    assert_eq!(second.json()["model"], "second");
    assert_eq!(server.get("/v1/models/second").json()["status"], "loaded");
    let unknown = server.post("/v1/chat/completions", &with(chat("Hi"), json!({"model": "gpt-4"})));
    assert_eq!(
        (unknown.status, &unknown.json()["error"]["code"]),
        (404, &json!("model_not_found"))
    );
    let broken = server.post("/v1/chat/completions", &with(chat("Hi"), json!({"model": "broken"})));
    assert_eq!(broken.status, 500);
    assert!(broken.body.contains("the file is damaged"));
}

#[test]
fn a_budget_unloads_what_was_used_longest_ago() {
    let server = Setup { budget: Some(1500), ..Setup::default() }.start();
    for (name, other) in [("second", "first"), ("first", "second")] {
        let body = with(chat("Hi"), json!({"model": name}));
        assert_eq!(server.post("/v1/chat/completions", &body).status, 200);
        assert_eq!(server.get(&format!("/v1/models/{name}")).json()["status"], "loaded");
        assert_eq!(server.get(&format!("/v1/models/{other}")).json()["status"], "available");
    }
}

/// Every path, with every kind of wrong key. That no path is missing from the description is a test of the routes.
#[test]
fn keys_guard_everything_but_health() {
    const OPEN: [&str; 3] = ["/health", "/ready", "/"];
    const RIGHT: [&str; 2] =
        ["authorization: Bearer a-long-secret\r\n", "x-api-key: a-long-secret\r\n"];
    const WRONG: [&str; 7] = [
        "",
        "authorization: Bearer a-long-secre\r\n",
        "authorization: Bearer a-long-secrets\r\n",
        "authorization: Basic a-long-secret\r\n",
        "authorization: a-long-secret\r\n",
        "authorization: Bearer\r\n",
        "x-api-key: another-secret\r\n",
    ];
    let keys = Key::parse_all("ann:a-long-secret").unwrap();
    let server = Setup { keys: Some(keys), ..Setup::default() }.start();
    let ask = |method: &str, path: &str, key: &str| {
        let headers = format!("content-type: application/json\r\n{key}");
        read(server.send(method, path, &headers, b"{}"))
    };
    let description = ask("GET", "/openapi.json", RIGHT[0]).json();
    let mut paths: Vec<(String, String)> = Vec::new();
    for (path, methods) in description["paths"].as_object().unwrap() {
        let path = path.replace("{id}", "first");
        paths.extend(methods.as_object().unwrap().keys().map(|m| (m.to_uppercase(), path.clone())));
    }
    assert!(paths.len() > 15, "{paths:?}");
    let more = [("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/"), ("HEAD", "/v1/models")];
    paths.extend(more.map(|(method, path)| (method.to_owned(), path.to_owned())));
    for (method, path) in &paths {
        for key in RIGHT {
            let status = ask(method, path, key).status;
            assert!(
                status == 200 || method == "POST" && status == 400,
                "{method} {path}: {status}"
            );
        }
        for key in WRONG {
            let response = ask(method, path, key);
            if OPEN.contains(&path.as_str()) {
                assert_eq!(response.status, 200, "{method} {path}");
                continue;
            }
            assert_eq!(response.status, 401, "{method} {path} with {key:?}");
            assert!(response.headers.contains_key("www-authenticate"), "{path}");
            if method == "HEAD" {
                continue;
            }
            let error = response.json();
            match path.starts_with("/v1/messages") {
                true => assert_eq!(error["error"]["type"], "authentication_error", "{path}"),
                false => assert_eq!(error["error"]["code"], "invalid_api_key", "{path}"),
            }
        }
    }
    // What is no path, or is asked with another method, tells no more than a path does.
    for (method, path) in [("GET", "/nowhere"), ("GET", "/v1/completions"), ("PUT", "/v1/models")] {
        assert_eq!(ask(method, path, WRONG[1]).status, 401, "{method} {path}");
        assert!([404, 405].contains(&ask(method, path, RIGHT[0]).status), "{method} {path}");
    }
    // The page and what it is made of, in which the key is typed.
    for link in server.get("/").body.split('"').filter(|part| part.starts_with("page/")) {
        assert_eq!(server.get(&format!("/{link}")).status, 200, "{link}");
    }
}

#[test]
fn quotas_and_queues_answer_429_with_a_time() {
    let quota = Quota { per_minute: Some(2), concurrent: None };
    let server = Setup { quota, ..Setup::default() }.start();
    for _ in 0..2 {
        assert_eq!(server.post("/tokenize", &json!({"prompt": "a"})).status, 200);
    }
    let response = server.post("/tokenize", &json!({"prompt": "a"}));
    assert_eq!(response.status, 429);
    assert!(response.headers["retry-after"].parse::<u64>().unwrap() >= 1);
    assert!(response.headers.contains_key("retry-after-ms"));
}

#[test]
fn bodies_that_are_wrong_are_the_clients_fault() {
    let config = Config { max_body_bytes: 4096, ..Config::default() };
    let server = Setup { config, ..Setup::default() }.start();
    let deep = format!("{}1{}", "[".repeat(2000), "]".repeat(2000));
    let bodies: [(&[u8], u16); 8] = [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b"{\"messages\": [}", 400),
        (b"\xff\xfe{}", 400),
        (deep.as_bytes(), 400),
        (&[b' '; 5000], 413),
    ];
    for (body, status) in bodies {
        for path in ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize"] {
            let response =
                read(server.send("POST", path, "content-type: application/json\r\n", body));
            assert_eq!(
                response.status,
                status,
                "{path} {:?}: {}",
                &body[..body.len().min(20)],
                response.body
            );
            assert!(response.json()["error"]["message"].is_string());
        }
    }
    let plain = read(server.send("POST", "/tokenize", "content-type: text/plain\r\n", b"{}"));
    assert_eq!(plain.status, 415);
    assert_eq!(server.get("/nowhere").status, 404);
    assert_eq!(server.get("/v1/chat/completions").status, 405);
    assert_eq!(server.raw(b"nonsense\r\n\r\n").status, 400);
}

#[test]
fn other_names_and_origins_are_kept_out() {
    let config = Config {
        hosts: vec!["localhost".into()],
        cors: vec!["https://ours.example".into()],
        ..Config::default()
    };
    let server = Setup { config, ..Setup::default() }.start();
    let at = |host: &str| {
        server.raw(
            format!("GET /v1/models HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")
                .as_bytes(),
        )
    };
    assert_eq!(at("localhost:8080").status, 200);
    assert_eq!(at("rebound.example").status, 403);
    let asked = read(server.send(
        "OPTIONS",
        "/v1/chat/completions",
        "origin: https://ours.example\r\n",
        b"",
    ));
    assert_eq!(asked.headers["access-control-allow-origin"], "https://ours.example");
    let other = read(server.send("GET", "/v1/models", "origin: https://other.example\r\n", b""));
    assert!(!other.headers.contains_key("access-control-allow-origin"));
}

#[test]
fn the_page_and_the_description_are_there() {
    let server = Setup::default().start();
    let page = server.get("/");
    assert!(page.headers["content-security-policy"].contains("default-src 'none'"));
    assert_eq!(page.headers["content-type"], "text/html; charset=utf-8");
    for link in page.body.split('"').filter(|part| part.starts_with("page/")) {
        assert_eq!(server.get(&format!("/{link}")).status, 200, "{link}");
    }
    let document = server.get("/openapi.json").json();
    assert!(document["paths"].as_object().unwrap().len() > 10);
    assert!(server.get("/docs").body.contains("/v1/chat/completions"));
    assert!(server.get("/metrics").body.contains("vllm:num_requests_running"));
}
