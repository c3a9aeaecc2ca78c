//! The table of agents. `{root}` stands for the server's address, `{v1}` for the same with `/v1`, `{model}` and `{key}` for what
//! requests carry, `{context}` for the tokens of prompt and answer together, `{answer}` for those of an answer.
//!
//! A row says where its facts were read and when; programs that are pointed elsewhere by a file or by arguments only have those.

/// One program, and how it is pointed at a server.
#[derive(Debug)]
pub struct Agent {
    /// As it is asked for.
    pub name: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    /// Its command; empty for a library.
    pub program: &'static str,
    /// Environment variables.
    pub variables: &'static [(&'static str, &'static str)],
    /// Variables that would win over those.
    pub unset: &'static [&'static str],
    /// Arguments that come before all others.
    pub arguments: &'static [&'static str],
    /// A file, and what to put into it.
    pub file: Option<(&'static str, &'static str)>,
    /// Which of the server's interfaces it uses.
    pub endpoint: &'static str,
    /// Where this was read, and when.
    pub source: &'static str,
}

const CHAT: &str = "/v1/chat/completions";
const MESSAGES: &str = "/v1/messages";
const RESPONSES: &str = "/v1/responses";

/// Every agent, by name.
pub const AGENTS: &[Agent] = &[
    Agent {
        name: "aider",
        about: "aider, pair programming in the terminal",
        program: "aider",
        variables: &[
            ("OPENAI_API_BASE", "{v1}"),
            ("OPENAI_API_KEY", "{key}"),
            ("AIDER_MODEL", "openai/{model}"),
        ],
        unset: &[],
        arguments: &[],
        file: None,
        endpoint: CHAT,
        source: "aider.chat/docs/llms/openai-compat.html and docs/config/dotenv.html, 2026-11",
    },
    Agent {
        name: "anthropic",
        about: "programs that use Anthropic's SDKs",
        program: "",
        variables: &[("ANTHROPIC_BASE_URL", "{root}"), ("ANTHROPIC_AUTH_TOKEN", "{key}")],
        unset: &["ANTHROPIC_API_KEY"],
        arguments: &[],
        file: None,
        endpoint: MESSAGES,
        source: "src/anthropic/_client.py of anthropics/anthropic-sdk-python, 2026-11",
    },
    Agent {
        name: "claude",
        about: "Claude Code",
        program: "claude",
        variables: &[
            ("ANTHROPIC_BASE_URL", "{root}"),
            ("ANTHROPIC_AUTH_TOKEN", "{key}"),
            ("ANTHROPIC_MODEL", "{model}"),
            ("ANTHROPIC_DEFAULT_OPUS_MODEL", "{model}"),
            ("ANTHROPIC_DEFAULT_SONNET_MODEL", "{model}"),
            ("ANTHROPIC_DEFAULT_HAIKU_MODEL", "{model}"),
            ("CLAUDE_CODE_MAX_OUTPUT_TOKENS", "{answer}"),
            ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1"),
        ],
        unset: &["ANTHROPIC_API_KEY"],
        arguments: &[],
        file: None,
        endpoint: MESSAGES,
        source: "code.claude.com/docs/en/env-vars, 2026-11",
    },
    Agent {
        name: "codex",
        about: "OpenAI Codex",
        program: "codex",
        variables: &[("MARLIN_API_KEY", "{key}")],
        unset: &[],
        arguments: &[
            "-c",
            "model_provider=\"marlin\"",
            "-c",
            "model_providers.marlin={ name = \"Metal Marlin\", base_url = \"{v1}\", env_key = \"MARLIN_API_KEY\", wire_api = \"responses\" }",
            // Tools of other kinds than functions, which only OpenAI's servers run.
            "-c",
            "web_search=\"disabled\"",
            "-c",
            "features.multi_agent=false",
            "--model",
            "{model}",
        ],
        file: Some((
            "~/.codex/config.toml",
            "model = \"{model}\"\nmodel_provider = \"marlin\"\nweb_search = \"disabled\"\n\n[features]\nmulti_agent = false\n\n[model_providers.marlin]\nname = \"Metal Marlin\"\n\
             base_url = \"{v1}\"\nenv_key = \"MARLIN_API_KEY\"\nwire_api = \"responses\"\n",
        )),
        endpoint: RESPONSES,
        source: "developers.openai.com/codex/config-advanced and 0.171 itself, 2026-11; it takes no wire_api but \"responses\", and model_provider from the user's file only",
    },
    Agent {
        name: "continue",
        about: "Continue, in editors",
        program: "",
        variables: &[],
        unset: &[],
        arguments: &[],
        file: Some((
            "~/.continue/config.yaml",
            "name: Metal Marlin\nversion: 0.0.1\nschema: v1\nmodels:\n  - name: Metal Marlin\n    provider: openai\n    model: \"{model}\"\n\
             \x20   apiBase: \"{v1}\"\n    apiKey: \"{key}\"\n",
        )),
        endpoint: CHAT,
        source: "docs.continue.dev/customize/model-providers/top-level/openai, 2026-11",
    },
    Agent {
        name: "crush",
        about: "Crush",
        program: "crush",
        variables: &[],
        unset: &[],
        arguments: &[],
        file: Some((
            "crush.json",
            r#"{
  "providers": {
    "marlin": {
      "name": "Metal Marlin",
      "type": "openai-compat",
      "base_url": "{v1}",
      "api_key": "{key}",
      "models": [
        { "id": "{model}", "name": "{model}", "context_window": {context}, "default_max_tokens": {answer} }
      ]
    }
  }
}
"#,
        )),
        endpoint: CHAT,
        source: "the README of charmbracelet/crush, on custom providers and local models, 2026-11",
    },
    Agent {
        name: "goose",
        about: "goose",
        program: "goose",
        variables: &[
            ("GOOSE_PROVIDER", "openai"),
            ("GOOSE_MODEL", "{model}"),
            ("OPENAI_HOST", "{root}"),
            ("OPENAI_BASE_PATH", "v1/chat/completions"),
            ("OPENAI_API_KEY", "{key}"),
        ],
        unset: &[],
        arguments: &[],
        file: None,
        endpoint: CHAT,
        source: "documentation/docs/guides/environment-variables.md of aaif-goose/goose, and goose-docs.ai on the provider OpenAI, 2026-11",
    },
    Agent {
        name: "openai",
        about: "programs that use OpenAI's SDKs",
        program: "",
        variables: &[("OPENAI_BASE_URL", "{v1}"), ("OPENAI_API_KEY", "{key}")],
        unset: &[],
        arguments: &[],
        file: None,
        endpoint: "what the program asks for",
        source: "the README of openai/openai-python, 2026-11",
    },
    Agent {
        name: "opencode",
        about: "opencode",
        program: "opencode",
        variables: &[],
        unset: &[],
        arguments: &[],
        // Its second version reads the words of the first, but none that stand in a variable.
        file: Some((
            "opencode.json",
            r#"{
  "$schema": "https://opencode.ai/config.json",
  "model": "marlin/{model}",
  "small_model": "marlin/{model}",
  "provider": {
    "marlin": {
      "npm": "@ai-sdk/openai-compatible",
      "name": "Metal Marlin",
      "options": { "baseURL": "{v1}", "apiKey": "{key}" },
      "models": {
        "{model}": { "name": "{model}", "limit": { "context": {context}, "output": {answer} } }
      }
    }
  }
}
"#,
        )),
        endpoint: CHAT,
        source: "opencode.ai/v1/docs/config and docs/migrate-v1, 2026-11",
    },
    Agent {
        name: "qwen",
        about: "Qwen Code",
        program: "qwen",
        variables: &[
            ("OPENAI_BASE_URL", "{v1}"),
            ("OPENAI_API_KEY", "{key}"),
            ("OPENAI_MODEL", "{model}"),
        ],
        unset: &[],
        // Without it the program first asks which protocol to speak.
        arguments: &["--auth-type", "openai"],
        file: None,
        endpoint: CHAT,
        source: "docs/users/configuration/auth.md and model-providers.md of QwenLM/qwen-code, 2026-11",
    },
];
