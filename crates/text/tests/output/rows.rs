//! Answers in every format and what is to come of them.

/// Format, answer, events with calls given out whole, and with calls given out while they are written
/// where that differs.
pub const ROWS: &[(&str, &str, &str, &str)] = &[
    // Content and reasoning.
    ("none", "Hi\n", r#"c"Hi\n""#, ""),
    ("none", "<think>x</think>", r#"c"<think>x</think>""#, ""),
    ("none+think", "\n<think>\nhm\n\nso\n</think>\n\nHi\n", r#"r"hm\n\nso" c"Hi\n""#, ""),
    ("none+think", " Hi <think>x</think>", r#"c" Hi <think>x</think>""#, ""),
    ("none+think", "<think>\n\n</think>\n\nHi", r#"c"Hi""#, ""),
    ("none+think", "<think>never\n", r#"r"never\n""#, ""),
    ("none+think", "\n <thi", r#"c"\n <thi""#, ""),
    ("none+think-brackets", "[THINK]a[/THIN[/THINK]b", r#"r"a[/THIN" c"b""#, ""),
    ("hermes", "  Hi \n", r#"c"  Hi \n""#, ""),
    // Qwen, Hermes.
    (
        "hermes+think",
        "<think>a</think>\n\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\"}}\n</tool_call>",
        r#"r"a" weather{"city": "Köln"}"#,
        "",
    ),
    (
        "hermes",
        "Let me see.\n\n<tool_call>{\"name\":\"now\",\"arguments\":{}}</tool_call>\n<tool_call>{\"arguments\":{\"days\":[1,-2.5e3]},\"name\":\"weather\"}</tool_call>\nSo",
        r#"c"Let me see." now{} weather{"days":[1,-2.5e3]} c"So""#,
        "",
    ),
    ("hermes", "<tool_call>{\"name\":\"now\"}", "now{}", ""),
    (
        "hermes",
        "<tool_call>{\"id\":7,\"name\":\"now\",\"arguments\":\"{\\\"a\\\": 1}\"}</tool_call>",
        r#"now{"a": 1}"#,
        "",
    ),
    (
        "hermes",
        "<tool_call>{\"name\":\"now\",\"arguments\":null}\n{\"name\":\"now\"}</tool_call>",
        "now{} now{}",
        "",
    ),
    (
        "hermes",
        "<tool_call>{\"name\":\"now\",\"arguments\":{\"a\":\"</tool_call>\ttab\nline\"}}</tool_call>",
        r#"now{"a":"</tool_call>\ttab\nline"}"#,
        "",
    ),
    (
        "hermes",
        "a <tool_call>{\"name\":\"rm\",\"arguments\":{}}</tool_call> b",
        r#"c"a <tool_call>{\"name\":\"rm\",\"arguments\":{}}</tool_call> b""#,
        "",
    ),
    (
        "hermes",
        "<tool_call>{\"name\":\"now\",\"arguments\":{\"a\":\"b",
        r#"c"<tool_call>{\"name\":\"now\",\"arguments\":{\"a\":\"b""#,
        r#"now{"a":"b…"#,
    ),
    (
        "hermes",
        "<tool_call>{\"name\":\"now\",\"arguments\":{\"a\":oops}}</tool_call>",
        r#"c"<tool_call>{\"name\":\"now\",\"arguments\":{\"a\":oops}}</tool_call>""#,
        r#"now{"a":… c"oops}}</tool_call>""#,
    ),
    (
        "hermes",
        "<tool_call>{\"name\":\"now\",\"arguments\":[1]}",
        r#"c"<tool_call>{\"name\":\"now\",\"arguments\":[1]}""#,
        "",
    ),
    ("hermes", "<tool_call>none</tool_call>", r#"c"<tool_call>none</tool_call>""#, ""),
    (
        "hermes",
        "<tool_call><tool_call>{\"name\":\"now\"}</tool_call>",
        r#"c"<tool_call>" now{}"#,
        "",
    ),
    (
        "hermes",
        "<tool_call>{\"name\":\"now\"} text</tool_call>",
        r#"now{} c" text</tool_call>""#,
        "",
    ),
    (
        "hermes",
        "<tool_call>{\"name\":\"now\",\"arguments\":{\"a\":\"\\ud800\"}}",
        r#"c"<tool_call>{\"name\":\"now\",\"arguments\":{\"a\":\"\\ud800\"}}""#,
        r#"now{"a":"\ud800… c"\"}}""#,
    ),
    ("hermes", "<tool_call>\n</tool_call>", r#"c"<tool_call>\n</tool_call>""#, ""),
    // GLM, with and without line breaks.
    (
        "glm+think",
        "\n<think>t</think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>a \"b\"\n</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        r#"r"t" weather{"city": "a \"b\"\n", "days": 3}"#,
        "",
    ),
    (
        "glm",
        "<tool_call>now</tool_call><tool_call>weather<arg_key>flag</arg_key><arg_value>True</arg_value></tool_call>",
        r#"now{} weather{"flag": true}"#,
        "",
    ),
    (
        "glm",
        "<tool_call>weather<arg_key>city</arg_key><arg_value>12</arg_value></tool_call>",
        r#"weather{"city": "12"}"#,
        "",
    ),
    (
        "glm",
        "<tool_call>weather<arg_key>both</arg_key><arg_value>12</arg_value><arg_key>both</arg_key><arg_value>x</arg_value></tool_call>",
        r#"weather{"both": 12, "both": "x"}"#,
        "",
    ),
    (
        "glm",
        "<tool_call>weather<arg_key>list</arg_key><arg_value>[1, \"x\"]</arg_value><arg_key>days</arg_key><arg_value>many</arg_value></tool_call>",
        r#"weather{"list": [1, "x"], "days": "many"}"#,
        "",
    ),
    (
        "glm",
        "<tool_call>weather<arg_key>pick</arg_key><arg_value>1</arg_value><arg_key>else</arg_key><arg_value>{\"a\":null}</arg_value></tool_call>",
        r#"weather{"pick": "1", "else": {"a":null}}"#,
        "",
    ),
    (
        "glm",
        "<tool_call>weather<arg_key>city</arg_key><arg_value>Kö</arg_val",
        r#"c"<tool_call>weather<arg_key>city</arg_key><arg_value>Kö</arg_val""#,
        r#"weather{"city": "Kö… c"</arg_val""#,
    ),
    ("glm", "<tool_call>who<arg_key>", r#"c"<tool_call>who<arg_key>""#, ""),
    (
        "glm",
        "<tool_call>is a tag <tool_call>now</tool_call>",
        r#"c"<tool_call>is a tag" now{}"#,
        "",
    ),
    // Qwen3-Coder.
    (
        "qwen-coder",
        "I look.\n<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
        r#"c"I look." weather{"city": "Köln\n", "days": 2}"#,
        "",
    ),
    (
        "qwen-coder",
        "<function=now>\n</function>\n</tool_call>\n<tool_call><function=now></function><function=now></function></tool_call>",
        "now{} now{} now{}",
        "",
    ),
    (
        "qwen-coder",
        "<function=weather><parameter=city></parameter></function> done",
        r#"weather{"city": ""} c" done""#,
        "",
    ),
    (
        "qwen-coder",
        "<function=weather><parameter=city>a</b\n<</parameter></function>",
        r#"weather{"city": "a</b\n<"}"#,
        "",
    ),
    ("qwen-coder", "a <function=gone>\n</function>", r#"c"a <function=gone>\n</function>""#, ""),
    (
        "qwen-coder",
        "<tool_call>\n<function=now>\noops",
        r#"c"<tool_call>\n<function=now>\noops""#,
        r#"now… c"\noops""#,
    ),
    // DeepSeek V3 and R1, V3.1.
    (
        "deepseek",
        "See:<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": \"K\"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        r#"c"See:" weather{"city": "K"} now{}"#,
        "",
    ),
    (
        "deepseek+think",
        "<think>x</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{\"a\": []}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        r#"r"x" now{"a": []}"#,
        "",
    ),
    ("deepseek", "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}", "now{}", ""),
    ("deepseek", "<｜tool▁calls▁begin｜>nothing", r#"c"<｜tool▁calls▁begin｜>nothing""#, ""),
    (
        "deepseek",
        "<｜tool▁call▁begin｜>thing<｜tool▁sep｜>now\n",
        r#"c"<｜tool▁call▁begin｜>thing<｜tool▁sep｜>now\n""#,
        "",
    ),
    // Llama 3.
    (
        "llama3",
        "{\"name\": \"weather\", \"parameters\": {\"city\": \"K\"}}",
        r#"weather{"city": "K"}"#,
        "",
    ),
    (
        "llama3",
        "\n<|python_tag|>{\"type\": \"function\", \"name\": \"now\", \"parameters\": {}}; {\"name\":\"now\",\"parameters\":{}}",
        "now{} now{}",
        "",
    ),
    (
        "llama3",
        "{\"name\": \"Ada\", \"born\": 1815}",
        r#"c"{\"name\": \"Ada\", \"born\": 1815}""#,
        "",
    ),
    ("llama3", "{\"name\": \"now\"} is it", r#"c"{\"name\": \"now\"} is it""#, ""),
    (
        "llama3",
        "Call {\"name\": \"now\", \"parameters\": {}}",
        r#"c"Call {\"name\": \"now\", \"parameters\": {}}""#,
        "",
    ),
    ("llama3", "<|python_tag|>print(1)", r#"c"<|python_tag|>print(1)""#, ""),
    // Mistral.
    (
        "mistral",
        "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"K\"}, \"id\": \"abcdefghi\"}, {\"name\":\"now\",\"arguments\":{}}]",
        r#"weather{"city": "K"} now{}"#,
        "",
    ),
    (
        "mistral+think-brackets",
        "[THINK]t[/THINK]ok[TOOL_CALLS]weather[ARGS]{\"city\": \"[/ARGS]\"}[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{}",
        r#"r"t" c"ok" weather{"city": "[/ARGS]"} now{}"#,
        "",
    ),
    ("mistral", "[TOOL_CALLS]now{\"a\": 1}", r#"now{"a": 1}"#, ""),
    ("mistral", "[TOOL_CALLS][]", r#"c"[TOOL_CALLS][]""#, ""),
    ("mistral", "[TOOL_CALLS]now [TOOL_CALLS]now[ARGS]{}", r#"c"[TOOL_CALLS]now" now{}"#, ""),
    ("mistral", "[TOOL_CALLS]gone[ARGS]{}", r#"c"[TOOL_CALLS]gone[ARGS]{}""#, ""),
];
