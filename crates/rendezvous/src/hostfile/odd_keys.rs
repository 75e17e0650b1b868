//! Keys that have no effect though the user meant them to: another port, user or address than
//! written would be used.

use serde_json::{Map, Value};

/// What users call it, and what to do instead.
const OF_A_HOST: &[(&[&str], &str)] = &[
    (
        &[
            "port",
            "ssh_port",
            "user",
            "username",
            "login",
            "key",
            "identity",
            "identity_file",
            "identityfile",
            "proxy",
            "jump",
            "proxyjump",
        ],
        "it belongs in ~/.ssh/config, or as user@name in \"ssh\"",
    ),
    (
        &["ip", "ipv4", "ipv6", "addr", "addrs", "address", "addresses", "ip_address", "ip_addresses", "ipaddress"],
        "the key is \"ips\", a list",
    ),
    (&["host", "hostname", "hosts", "name", "node"], "the key is \"ssh\""),
    (&["device", "devices", "rdma_device", "rdma_devices", "ibv", "ibv_devices"], "the key is \"rdma\""),
    (
        &["slots", "gpus", "ranks", "processes", "nproc", "np", "count"],
        "every host of the file has one rank; name it again for another",
    ),
    (&["env", "envs", "environment"], "\"envs\" stands beside \"hosts\" and counts for all of them"),
];
const OF_THE_FILE: &[(&[&str], &str)] = &[
    (&["env", "environment", "variables"], "the key is \"envs\", a list such as [\"NAME=value\"]"),
    (&["host", "nodes", "machines"], "the key is \"hosts\""),
    (&["backends", "transport"], "the key is \"backend\""),
    (&["port", "user"], "it belongs in ~/.ssh/config"),
];

/// No file is worth more lines than that.
const MOST: usize = 20;

/// A line for each such key of a hostfile.
pub(super) fn notices(file: &Value) -> Vec<String> {
    let mut notices = Vec::new();
    let (hosts, object) = match file {
        Value::Array(hosts) => (Some(hosts), None),
        Value::Object(object) => (object.get("hosts").and_then(Value::as_array), Some(object)),
        _ => (None, None),
    };
    if let Some(object) = object {
        look(object, &["backend", "envs", "hosts"], OF_THE_FILE, "the hostfile", &mut notices);
    }
    for (index, host) in hosts.into_iter().flatten().enumerate() {
        if let Value::Object(host) = host {
            look(host, &["ssh", "ips", "rdma"], OF_A_HOST, &format!("host {index} of the hostfile"), &mut notices);
        }
    }
    notices.truncate(MOST);
    notices
}

fn look(
    object: &Map<String, Value>,
    known: &[&str],
    others: &[(&[&str], &str)],
    whose: &str,
    notices: &mut Vec<String>,
) {
    for key in object.keys().filter(|key| !known.contains(&key.as_str())) {
        let plain = key.to_ascii_lowercase().replace('-', "_");
        let instead =
            others.iter().find(|(names, _)| names.contains(&plain.as_str())).map(|(_, what)| (*what).to_owned());
        let meant = || known.iter().find(|known| is_near(&plain, known)).map(|known| format!("the key is {known:?}"));
        if let Some(instead) = instead.or_else(meant) {
            notices.push(format!("{key:?} of {whose} is passed over: {instead}"));
        }
    }
}

/// The same word in other letters of the same number, or with one letter more or less.
fn is_near(word: &str, known: &str) -> bool {
    let sorted = |word: &str| {
        let mut letters: Vec<char> = word.chars().collect();
        letters.sort_unstable();
        letters
    };
    let without_one = |long: &str, short: &str| {
        long.char_indices().any(|(at, letter)| {
            let rest = &long[at + letter.len_utf8()..];
            short.strip_prefix(&long[..at]).is_some_and(|short| short == rest)
        })
    };
    sorted(word) == sorted(known) || without_one(word, known) || without_one(known, word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_keys_that_were_meant_get_a_line() {
        let of = |text: &str| notices(&serde_json::from_str(text).expect("JSON"));
        for (key, says) in [
            ("port", "~/.ssh/config"),
            ("User", "~/.ssh/config"),
            ("ip", "\"ips\", a list"),
            ("ip-address", "\"ips\", a list"),
            ("rmda", "\"rdma\""),
            ("rdm", "\"rdma\""),
            ("SSH", "\"ssh\""),
            ("hostname", "\"ssh\""),
            ("slots", "one rank"),
        ] {
            let found = of(&format!(r#"[{{"ssh":"a","{key}":1}}]"#));
            assert!(found.len() == 1 && found[0].contains(says) && found[0].contains(key), "{key}: {found:?}");
        }
        assert_eq!(of(r#"{"hosts":[{"ssh":"a","note":"mine","rack":3}],"comment":1}"#), [""; 0]);
        assert!(of(r#"{"hosts":[],"env":["A=1"]}"#)[0].contains("\"envs\""));
    }
}
