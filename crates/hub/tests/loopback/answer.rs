//! What the hub on loopback says to each request.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::store::{Access, Repository, git_name, is_large, pointer, sha256};
use super::wire::{Answer, Request};
use super::{State, Xet};

pub fn answer(state: &mut State, request: &Request) -> Answer {
    let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
    let segments: Vec<String> = path.trim_start_matches('/').split('/').map(decoded).collect();
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    let given = request.token();
    if given.is_some() && !segments.starts_with(&["lfs"]) && who(state, given).is_none() {
        return Answer::refusal(401, "", "Invalid credentials in Authorization header");
    }
    match (request.method.as_str(), &segments[..]) {
        ("GET", ["api", "whoami-v2"]) => match who(state, given) {
            Some(name) => Answer::json(&json!({ "type": "user", "name": name, "fullname": name, "orgs": [] })),
            None => Answer::refusal(401, "", "Invalid username or password."),
        },
        ("POST", ["api", "validate-yaml"]) => Answer::json(&json!({ "errors": [], "warnings": [] })),
        ("POST", ["api", "repos", "create"]) => create(state, request),
        ("GET" | "HEAD", ["lfs", oid]) => large(state, request, oid),
        ("PUT", ["lfs-upload", oid]) => {
            if sha256(&request.body) != *oid {
                return Answer::refusal(400, "", "these bytes have another SHA-256");
            }
            state.store.sent.insert((*oid).to_owned(), request.body.clone());
            Answer { status: 200, ..Answer::default() }
        }
        (method, ["api", kind @ ("models" | "datasets"), owner, name, rest @ ..]) => {
            let id = format!("{owner}/{name}");
            if let Some(now) = state.store.moved.get(&id) {
                return moved(&request.target.replacen(&id, now, 1));
            }
            if let Some(refused) = unseen(state, kind, &id, given) {
                return refused;
            }
            api(state, request, method, kind, &id, rest, query)
        }
        ("POST", [owner, name, "info", "lfs", "objects", "batch"]) => {
            let id = format!("{owner}/{}", name.strip_suffix(".git").unwrap_or(name));
            unseen(state, "models", &id, given).unwrap_or_else(|| batch(state, request))
        }
        ("GET" | "HEAD", ["datasets", owner, name, "resolve", revision, file @ ..]) => {
            resolve(state, request, "datasets", &format!("{owner}/{name}"), revision, &file.join("/"))
        }
        ("GET" | "HEAD", [owner, name, "resolve", revision, file @ ..]) => {
            resolve(state, request, "models", &format!("{owner}/{name}"), revision, &file.join("/"))
        }
        _ => Answer::refusal(404, "", "Sorry, we can't find the page you are looking for."),
    }
}

/// The user of a token.
fn who(state: &State, token: Option<&str>) -> Option<&'static str> {
    let token = token?;
    if state.store.token.as_deref() == Some(token) {
        return Some("tester");
    }
    (state.store.stranger.as_deref() == Some(token)).then_some("stranger")
}

/// The refusal for who may not see a repository.
fn unseen(state: &State, kind: &str, id: &str, token: Option<&str>) -> Option<Answer> {
    let repository = state.store.repositories.get(&(kind.to_owned(), id.to_owned()));
    let visible = repository
        .is_some_and(|repository| repository.access != Access::Private || who(state, token) == Some("tester"));
    match (visible, token) {
        (true, _) => None,
        // To strangers, a private repository is as one that is not there.
        (false, None) => Some(Answer::refusal(401, "RepoNotFound", "Invalid username or password.")),
        (false, Some(_)) => Some(Answer::refusal(404, "RepoNotFound", "Repository not found")),
    }
}

fn moved(target: &str) -> Answer {
    Answer { status: 307, headers: vec![("Location", target.to_owned())], body: Vec::new() }
}

/// What lies below `/api/KIND/ID`.
fn api(state: &mut State, request: &Request, method: &str, kind: &str, id: &str, rest: &[&str], query: &str) -> Answer {
    let page = state.page;
    let endpoint = format!("http://127.0.0.1:{}", state.port);
    let repository = state.store.repository(kind, id).clone();
    match (method, rest) {
        ("GET", []) => info(&repository, id, "main"),
        ("GET", ["revision", revision]) => info(&repository, id, revision),
        ("GET", ["tree", revision]) => {
            let Some(commit) = repository.resolve(revision) else { return no_revision(revision) };
            let after = query.split('&').find_map(|part| part.strip_prefix("cursor=")).map(decoded);
            let mut entries = tree(&repository.commits[commit], state.xet != Xet::None);
            entries.retain(|entry| after.as_deref().is_none_or(|after| entry["path"].as_str() > Some(after)));
            if page == 0 || entries.len() <= page {
                return Answer::json(&Value::Array(entries));
            }
            entries.truncate(page);
            let last = entries[page - 1]["path"].as_str().unwrap_or_default().replace('/', "%2F");
            let next = format!("{endpoint}/api/{kind}/{id}/tree/{revision}?recursive=true&cursor={last}");
            let mut answer = Answer::json(&Value::Array(entries));
            answer.headers.push(("Link", format!("<{next}>; rel=\"next\"")));
            answer
        }
        ("POST", [what @ ("preupload" | "commit" | "branch"), revision]) => {
            if who(state, request.token()) != Some("tester") {
                return Answer::refusal(403, "", "You don't have the rights to write here");
            }
            let body: Vec<Value> =
                serde_json::Deserializer::from_slice(&request.body).into_iter().filter_map(Result::ok).collect();
            match *what {
                "preupload" => preupload(&repository, revision, &body),
                "commit" => commit(state, kind, id, revision, &body, &endpoint),
                _ => branch(state, kind, id, revision),
            }
        }
        _ => Answer::refusal(404, "", "no such endpoint"),
    }
}

fn no_revision(revision: &str) -> Answer {
    Answer::refusal(404, "RevisionNotFound", &format!("Invalid rev id: {revision}"))
}

fn info(repository: &Repository, id: &str, revision: &str) -> Answer {
    let Some(commit) = repository.resolve(revision) else { return no_revision(revision) };
    let siblings: Vec<Value> = repository.commits[commit].keys().map(|name| json!({ "rfilename": name })).collect();
    let gated = if repository.access == Access::Gated { json!("manual") } else { json!(false) };
    Answer::json(&json!({
        "_id": "0", "id": id, "modelId": id, "author": id.split('/').next(), "sha": commit, "private": repository.access == Access::Private,
        "gated": gated, "disabled": false, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings,
        "createdAt": "2026-01-01T00:00:00.000Z", "lastModified": "2026-01-01T00:00:00.000Z",
    }))
}

/// The entries of a listing with all folders in it, sorted.
fn tree(files: &BTreeMap<String, Vec<u8>>, in_xet: bool) -> Vec<Value> {
    let mut entries = BTreeMap::new();
    for (name, bytes) in files {
        let oid = git_name(name, bytes);
        let mut entry = json!({ "type": "file", "oid": oid, "size": bytes.len(), "path": name });
        if is_large(name) {
            entry["lfs"] = json!({ "oid": sha256(bytes), "size": bytes.len(), "pointerSize": pointer(bytes).len() });
            if in_xet {
                entry["xetHash"] = json!(sha256(bytes));
            }
        }
        entries.insert(name.clone(), entry);
        for (at, _) in name.match_indices('/') {
            let folder = &name[..at];
            entries.insert(folder.to_owned(), json!({ "type": "directory", "oid": "0", "size": 0, "path": folder }));
        }
    }
    entries.into_values().collect()
}

/// A file, or where a large one lies.
fn resolve(state: &mut State, request: &Request, kind: &str, id: &str, revision: &str, file: &str) -> Answer {
    if let Some(now) = state.store.moved.get(id) {
        return moved(&request.target.replacen(id, now, 1));
    }
    if let Some(refused) = unseen(state, kind, id, request.token()) {
        return refused;
    }
    let repository = state.store.repository(kind, id).clone();
    match (repository.access, who(state, request.token())) {
        (Access::Gated, None) => {
            let message = format!(
                "Access to model {id} is restricted. You must have access to it and be authenticated to access it."
            );
            return Answer::refusal(401, "GatedRepo", &message);
        }
        (Access::Gated, Some("stranger")) => {
            let message = format!("Access to model {id} is restricted and you are not in the authorized list.");
            return Answer::refusal(403, "GatedRepo", &message);
        }
        _ => {}
    }
    let Some(commit) = repository.resolve(revision) else { return no_revision(revision) };
    let mut headers = vec![("X-Repo-Commit", commit.to_owned())];
    let Some(bytes) = repository.commits[commit].get(file) else {
        let mut answer = Answer::refusal(404, "EntryNotFound", "Entry not found");
        answer.headers.extend(headers);
        return answer;
    };
    headers.push(("Accept-Ranges", "bytes".to_owned()));
    headers.push(("ETag", format!("\"{}\"", git_name(file, bytes))));
    if !is_large(file) {
        return Answer { status: 200, headers, body: bytes.clone() };
    }
    let oid = sha256(bytes);
    headers.push(("X-Linked-ETag", format!("\"{oid}\"")));
    headers.push(("X-Linked-Size", bytes.len().to_string()));
    if state.xet == Xet::Redirect {
        let token = format!("http://127.0.0.1:{}/api/{kind}/{id}/xet-read-token/{commit}", state.port);
        headers.push(("X-Xet-Hash", oid.clone()));
        headers.push(("Link", format!("<{token}>; rel=\"xet-auth\"")));
    }
    // Another host, so that clients keep the token to themselves.
    headers.push(("Location", format!("http://localhost:{}/lfs/{oid}?signature=abc", state.port)));
    headers.retain(|(name, _)| *name != "Accept-Ranges");
    Answer { status: 302, headers, body: Vec::new() }
}

/// A large file, at an address that is signed.
fn large(state: &State, request: &Request, oid: &str) -> Answer {
    if request.token().is_some() {
        return Answer::refusal(400, "", "Only one auth mechanism allowed");
    }
    match state.store.large(oid) {
        Some(bytes) => {
            let mut headers = vec![("Accept-Ranges", "bytes".to_owned()), ("ETag", format!("\"{oid}\""))];
            if state.xet == Xet::File {
                headers.push(("X-Xet-Hash", oid.to_owned()));
            }
            Answer { status: 200, headers, body: bytes.clone() }
        }
        None => Answer::refusal(404, "", "no such object"),
    }
}

fn create(state: &mut State, request: &Request) -> Answer {
    let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
    let Some(user) = who(state, request.token()) else {
        return Answer::refusal(401, "", "Invalid username or password.");
    };
    let owner = body["organization"].as_str().unwrap_or(user).to_owned();
    let name = body["name"].as_str().unwrap_or_default();
    let (owner, name) = match name.split_once('/') {
        Some((owner, name)) => (owner.to_owned(), name),
        None => (owner, name),
    };
    if owner != user {
        let message = format!("You don't have the rights to create a model under the namespace \"{owner}\"");
        return Answer::refusal(403, "", &message);
    }
    let kind = format!("{}s", body["type"].as_str().unwrap_or("model"));
    let id = format!("{owner}/{name}");
    let url = format!("http://127.0.0.1:{}/{id}", state.port);
    if state.store.repositories.contains_key(&(kind.clone(), id.clone())) {
        let mut answer = Answer::refusal(409, "", "You already created this model repo");
        answer.body = json!({ "error": "You already created this model repo", "url": url }).to_string().into_bytes();
        return answer;
    }
    let repository = state.store.repository(&kind, &id);
    if body["private"] == true || body["visibility"] == "private" {
        repository.access = Access::Private;
    }
    let attributes = BTreeMap::from([(".gitattributes".to_owned(), b"*.safetensors filter=lfs\n".to_vec())]);
    repository.commit("main", attributes);
    Answer::json(&json!({ "url": url, "name": id, "id": id }))
}

fn preupload(repository: &Repository, revision: &str, body: &[Value]) -> Answer {
    let Some(commit) = repository.resolve(revision) else { return no_revision(revision) };
    let files = body.first().and_then(|body| body["files"].as_array()).cloned().unwrap_or_default();
    let mode = |file: &Value| {
        let path = file["path"].as_str().unwrap_or_default();
        let there = repository.commits[commit].get(path).map(|bytes| git_name(path, bytes));
        json!({ "path": path, "uploadMode": if is_large(path) { "lfs" } else { "regular" }, "shouldIgnore": false, "oid": there })
    };
    Answer::json(&json!({ "files": files.iter().map(mode).collect::<Vec<_>>(), "commitOid": commit }))
}

/// Where large files are to be sent.
fn batch(state: &State, request: &Request) -> Answer {
    let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
    let object = |object: &Value| {
        let oid = object["oid"].as_str().unwrap_or_default();
        let href = format!("http://127.0.0.1:{}/lfs-upload/{oid}", state.port);
        match state.store.large(oid) {
            Some(_) => json!({ "oid": oid, "size": object["size"] }),
            None => {
                json!({ "oid": oid, "size": object["size"], "actions": { "upload": { "href": href, "header": {} } } })
            }
        }
    };
    let objects: Vec<Value> = body["objects"].as_array().into_iter().flatten().map(object).collect();
    Answer::json(&json!({ "transfer": "basic", "objects": objects }))
}

fn branch(state: &mut State, kind: &str, id: &str, name: &str) -> Answer {
    let repository = state.store.repository(kind, id);
    if repository.refs.contains_key(name) {
        return Answer::refusal(409, "", "Reference already exists");
    }
    let main = repository.refs["main"].clone();
    repository.refs.insert(name.to_owned(), main);
    Answer { status: 201, ..Answer::default() }
}

fn commit(state: &mut State, kind: &str, id: &str, revision: &str, body: &[Value], endpoint: &str) -> Answer {
    let mut files = state.store.repository(kind, id).files(revision).clone();
    for line in body {
        let value = &line["value"];
        let path = value["path"].as_str().unwrap_or_default().to_owned();
        match line["key"].as_str() {
            Some("file") => match decoded_base64(value["content"].as_str().unwrap_or_default()) {
                Some(bytes) => drop(files.insert(path, bytes)),
                None => return Answer::refusal(400, "", "this is no base64"),
            },
            Some("lfsFile") => match state.store.large(value["oid"].as_str().unwrap_or_default()) {
                Some(bytes) => drop(files.insert(path, bytes.clone())),
                None => return Answer::refusal(400, "", "this large file was not sent"),
            },
            Some("deletedFile") => drop(files.remove(&path)),
            _ => {}
        }
    }
    let commit = state.store.repository(kind, id).commit(revision, files);
    Answer::json(
        &json!({ "success": true, "commitOid": commit, "commitUrl": format!("{endpoint}/{id}/commit/{commit}"), "hookOutput": "" }),
    )
}

/// Text with `%2F` and the like as what they stand for.
fn decoded(text: &str) -> String {
    let (bytes, mut out, mut at) = (text.as_bytes(), Vec::new(), 0);
    while at < bytes.len() {
        let hex = text.get(at + 1..at + 3).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match (bytes[at], hex) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn decoded_base64(text: &str) -> Option<Vec<u8>> {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0u32, 0);
    for letter in text.bytes().filter(|letter| *letter != b'=') {
        bits = bits << 6 | LETTERS.iter().position(|known| *known == letter)? as u32;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Some(bytes)
}
