//! What there is and how it is.

use super::Server;
use crate::{ApiError, FINGERPRINT};
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::sync::Arc;

fn card(server: &Server, index: usize) -> Value {
    let id = server.models.ids()[index];
    let mut card = json!({
        "id": id, "object": "model", "created": server.models.created, "owned_by": "marlin",
        "root": id, "parent": null,
    });
    let loaded = server.models.loaded(index);
    card["status"] = json!(if loaded.is_some() { "loaded" } else { "available" });
    if let Some(served) = loaded {
        card["max_model_len"] = json!(served.runtime.limits().max_context);
        card["bytes"] = json!(served.bytes);
        card["device"] = json!(served.device);
    }
    card
}

/// `GET /v1/models`.
pub(super) async fn models(State(server): State<Arc<Server>>) -> Json<Value> {
    let cards: Vec<Value> = (0..server.models.ids().len()).map(|i| card(&server, i)).collect();
    Json(json!({"object": "list", "data": cards}))
}

/// `GET /v1/models/{id}`.
pub(super) async fn model(
    State(server): State<Arc<Server>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(id) = id.map_err(|error| ApiError::invalid("id", error.body_text()))?;
    Ok(Json(card(&server, server.models.resolve(Some(&id))?)))
}

/// `GET /metrics`.
pub(super) async fn metrics(State(server): State<Arc<Server>>) -> Response {
    let text = server.metrics.text(&server.models, server.config.tracer.as_ref());
    ([(CONTENT_TYPE, crate::metrics::CONTENT_TYPE)], text).into_response()
}

/// `GET /health`: whether the process does its work.
pub(super) async fn health(State(server): State<Arc<Server>>) -> Response {
    let dead = server.models.all_loaded().iter().any(|served| served.runtime.is_dead());
    let status = match () {
        () if dead => {
            return (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "failed"})))
                .into_response();
        }
        () if server.is_draining() => "draining",
        () if server.models.loaded(0).is_none() => "loading",
        () => "ok",
    };
    Json(json!({"status": status})).into_response()
}

/// `GET /ready`: whether requests are taken.
pub(super) async fn ready(State(server): State<Arc<Server>>) -> Response {
    let loaded = server.models.loaded(0).is_some_and(|served| !served.runtime.is_dead());
    match loaded && !server.is_draining() {
        true => Json(json!({"status": "ready"})).into_response(),
        false => {
            let status = if server.is_draining() { "draining" } else { "loading" };
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": status}))).into_response()
        }
    }
}

/// `GET /version`.
pub(super) async fn version() -> Json<Value> {
    Json(
        json!({"version": env!("CARGO_PKG_VERSION"), "name": "marlin", "fingerprint": FINGERPRINT}),
    )
}
