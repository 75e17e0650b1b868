//! Hostfiles: as MLX writes them, as people write them, and wrong.

use expect_test::{Expect, expect};
use finetune_allreduce::Shape;

use super::*;

/// The example of MLX's documentation, as `mlx.distributed_config` prints it.
const JACCL: &str = r#"{
    "backend": "jaccl",
    "envs": ["MLX_METAL_FAST_SYNCH=1"],
    "hosts": [
        {"ssh": "mac1", "ips": ["192.168.1.11"], "rdma": [null, "rdma_en2", "rdma_en3"]},
        {"ssh": "mac2", "ips": ["192.168.1.12"], "rdma": ["rdma_en2", null, "rdma_en3"]},
        {"ssh": "mac3", "ips": ["192.168.1.13"], "rdma": ["rdma_en2", "rdma_en3", null]}
    ]
}"#;

const BARE: &str = r#"[{"ssh":"mini-1","ips":["10.0.0.1","10.0.1.1"],"rdma":[null,["rdma_en2","rdma_en3"]]},
                       {"ssh":"me@mini-2","ips":[],"rdma":[["rdma_en2","rdma_en3"],null]}]"#;

#[test]
fn both_forms() {
    let jaccl = Hostfile::parse(JACCL).unwrap();
    assert_eq!(jaccl.backend.as_deref(), Some("jaccl"));
    assert_eq!(jaccl.environment, [("MLX_METAL_FAST_SYNCH".to_owned(), "1".to_owned())]);
    assert_eq!(jaccl.coordinator(), Some("192.168.1.11"));
    assert_eq!(jaccl.devices().unwrap().unwrap().shape(), Shape::Mesh);
    assert_eq!(jaccl.hosts[1].rdma[2], ["rdma_en3"]);

    let bare = Hostfile::parse(BARE).unwrap();
    assert_eq!((bare.backend.as_deref(), bare.environment.len(), bare.hosts.len()), (None, 0, 2));
    assert_eq!(bare.hosts[1].ssh, "me@mini-2");
    assert_eq!(bare.devices().unwrap().unwrap().wires(1, 0), ["rdma_en2", "rdma_en3"]);

    let plain = Hostfile::parse(r#"{"hosts":[{"ssh":"a","note":"mine"},{"ssh":"b","ips":null}],"comment":1}"#).unwrap();
    assert_eq!((plain.coordinator(), plain.devices().unwrap()), (None, None));
}

#[test]
fn text_reads_back() {
    expect![[r#"
        {
          "backend": "jaccl",
          "envs": ["MLX_METAL_FAST_SYNCH=1"],
          "hosts": [
            {"ssh":"mac1","ips":["192.168.1.11"],"rdma":[null,"rdma_en2","rdma_en3"]},
            {"ssh":"mac2","ips":["192.168.1.12"],"rdma":["rdma_en2",null,"rdma_en3"]},
            {"ssh":"mac3","ips":["192.168.1.13"],"rdma":["rdma_en2","rdma_en3",null]}
          ]
        }
    "#]]
    .assert_eq(&Hostfile::parse(JACCL).unwrap().to_json());
    for text in [
        JACCL,
        BARE,
        r#"[{"ssh":"a"}]"#,
        r#"{"backend":"","envs":["A=b=c d","EMPTY=","NONE"],"hosts":[{"ssh":"fd00::1"},{"ssh":"a\"b\\c"}]}"#,
        r#"{"envs":["LINES=1\n2\t\u001b"],"hosts":[{"ssh":"ä","ips":["x","fd00::1","fe80::1%en5"]}]}"#,
    ] {
        let hostfile = Hostfile::parse(text).unwrap();
        let again = hostfile.to_json();
        assert_eq!(Hostfile::parse(&again).unwrap(), hostfile, "{again}");
        assert_eq!(Hostfile::parse(&again).unwrap().to_json(), again);
    }
}

/// The message and its hint.
fn refused(text: &str) -> String {
    let error = Hostfile::parse(text).and_then(|hostfile| hostfile.devices()).expect_err(text);
    format!("{error}\n{}", error.hints().join("\n"))
}

/// Each text must be refused with this message and hint.
#[track_caller]
fn check_refused(cases: &[(&str, Expect)]) {
    for (text, expected) in cases {
        expected.assert_eq(&refused(text));
    }
}

#[test]
fn errors_of_the_whole_file() {
    check_refused(&[
        (
            "",
            expect![[r#"
            the hostfile is not JSON: EOF while parsing a value at line 1 column 0
            a hostfile looks like {"hosts": [{"ssh": "mini-1", "ips": ["10.0.0.1"]}]}; `finetune cluster discover` writes one"#]],
        ),
        (
            r#"{"hosts":"#,
            expect![[r#"
            the hostfile is not JSON: EOF while parsing a value at line 1 column 9
            a hostfile looks like {"hosts": [{"ssh": "mini-1", "ips": ["10.0.0.1"]}]}; `finetune cluster discover` writes one"#]],
        ),
        (
            "7",
            expect![[r#"
            the hostfile is a number, not an object with "hosts" and not a list of hosts
            a hostfile looks like {"hosts": [{"ssh": "mini-1", "ips": ["10.0.0.1"]}]}; `finetune cluster discover` writes one"#]],
        ),
        (
            "{}",
            expect![[r#"
            the hostfile has no "hosts"
            a hostfile looks like {"hosts": [{"ssh": "mini-1", "ips": ["10.0.0.1"]}]}; `finetune cluster discover` writes one"#]],
        ),
        (
            r#"{"hosts":{"ssh":"a"}}"#,
            expect![[r#"
            "hosts" of the hostfile: it is an object, not a list
            a hostfile looks like {"hosts": [{"ssh": "mini-1", "ips": ["10.0.0.1"]}]}; `finetune cluster discover` writes one"#]],
        ),
        (
            "[]",
            expect![[r#"
            "hosts" of the hostfile: there are none
            a hostfile looks like {"hosts": [{"ssh": "mini-1", "ips": ["10.0.0.1"]}]}; `finetune cluster discover` writes one"#]],
        ),
        (
            r#"{"hosts":[]}"#,
            expect![[r#"
            "hosts" of the hostfile: there are none
            a hostfile looks like {"hosts": [{"ssh": "mini-1", "ips": ["10.0.0.1"]}]}; `finetune cluster discover` writes one"#]],
        ),
    ]);
}

#[test]
fn errors_of_backend_and_environment() {
    check_refused(&[
        (
            r#"{"backend":5,"hosts":[{"ssh":"a"}]}"#,
            expect![[r#"
            "backend" of the hostfile: it is a number, not a string
            a hostfile looks like {"hosts": [{"ssh": "mini-1", "ips": ["10.0.0.1"]}]}; `finetune cluster discover` writes one"#]],
        ),
        (
            r#"{"backend":"ring jaccl","hosts":[{"ssh":"a"}]}"#,
            expect![[r#"
            "backend" of the hostfile: "ring jaccl" has white space or a control character
            a hostfile looks like {"hosts": [{"ssh": "mini-1", "ips": ["10.0.0.1"]}]}; `finetune cluster discover` writes one"#]],
        ),
        (
            r#"{"envs":{"A":"1"},"hosts":[{"ssh":"a"}]}"#,
            expect![[r#"
            "envs" of the hostfile: it is an object, not a list
            "envs" is a list such as ["NAME=value"]"#]],
        ),
        (
            r#"{"envs":[1],"hosts":[{"ssh":"a"}]}"#,
            expect![[r#"
            "envs" of the hostfile: a number is not a string
            "envs" is a list such as ["NAME=value"]"#]],
        ),
        (
            r#"{"envs":["A=1","B C=1"],"hosts":[{"ssh":"a"}]}"#,
            expect![[r#"
            "envs" of the hostfile: "B C" is not the name of a variable
            "envs" is a list such as ["NAME=value"]"#]],
        ),
        (
            r#"{"envs":["=1"],"hosts":[{"ssh":"a"}]}"#,
            expect![[r#"
            "envs" of the hostfile: "" is not the name of a variable
            "envs" is a list such as ["NAME=value"]"#]],
        ),
        (
            r#"{"envs":["2A=1"],"hosts":[{"ssh":"a"}]}"#,
            expect![[r#"
            "envs" of the hostfile: "2A" is not the name of a variable
            "envs" is a list such as ["NAME=value"]"#]],
        ),
        (
            r#"{"envs":["A=\u0000"],"hosts":[{"ssh":"a"}]}"#,
            expect![[r#"
            "envs" of the hostfile: the value of A has a zero byte
            "envs" is a list such as ["NAME=value"]"#]],
        ),
    ]);
}

#[test]
fn errors_of_ssh_names() {
    check_refused(&[
        (
            r#"["10.0.0.1","10.0.0.2"]"#,
            expect![[r#"
            host 0 is a string, not an object with "ssh"
            a hostfile looks like {"hosts": [{"ssh": "mini-1", "ips": ["10.0.0.1"]}]}; `finetune cluster discover` writes one"#]],
        ),
        (
            r#"[["10.0.0.1:5000"]]"#,
            expect![[r#"
            host 0 is a list, not an object with "ssh"
            a hostfile looks like {"hosts": [{"ssh": "mini-1", "ips": ["10.0.0.1"]}]}; `finetune cluster discover` writes one"#]],
        ),
        (
            r#"[{"ssh":"a"},{"ips":["10.0.0.2"]}]"#,
            expect![[r#"
            host 1 has no "ssh"
            a hostfile looks like {"hosts": [{"ssh": "mini-1", "ips": ["10.0.0.1"]}]}; `finetune cluster discover` writes one"#]],
        ),
        (
            r#"[{"ssh":null}]"#,
            expect![[r#"
            "ssh" of host 0: null is not a string
            "ssh" is the name that `ssh NAME` takes, without options; options belong in ~/.ssh/config"#]],
        ),
        (
            r#"[{"ssh":""}]"#,
            expect![[r#"
            "ssh" of host 0: "" is empty
            "ssh" is the name that `ssh NAME` takes, without options; options belong in ~/.ssh/config"#]],
        ),
        (
            r#"[{"ssh":"a"},{"ssh":"-oProxyCommand=touch /tmp/x"}]"#,
            expect![[r#"
            "ssh" of host 1: "-oProxyCommand=touch /tmp/x" starts with '-' and would be taken for an option
            "ssh" is the name that `ssh NAME` takes, without options; options belong in ~/.ssh/config"#]],
        ),
        (
            r#"[{"ssh":"a -v"}]"#,
            expect![[r#"
            "ssh" of host 0: "a -v" has white space or a control character
            "ssh" is the name that `ssh NAME` takes, without options; options belong in ~/.ssh/config"#]],
        ),
        (
            r#"[{"ssh":"a\n"}]"#,
            expect![[r#"
            "ssh" of host 0: "a\n" has white space or a control character
            "ssh" is the name that `ssh NAME` takes, without options; options belong in ~/.ssh/config"#]],
        ),
        (
            r#"[{"ssh":"a\u0000"}]"#,
            expect![[r#"
            "ssh" of host 0: "a\0" has white space or a control character
            "ssh" is the name that `ssh NAME` takes, without options; options belong in ~/.ssh/config"#]],
        ),
    ]);
}

#[test]
fn errors_of_addresses_and_devices() {
    check_refused(&[
        (
            r#"[{"ssh":"a","ips":"10.0.0.1"}]"#,
            expect![[r#"
            "ips" of host 0: it is a string, not a list
            "ips" is a list of addresses, such as ["10.0.0.1"]; the port is not part of it"#]],
        ),
        (
            r#"[{"ssh":"a","ips":["10.0.0.1",2]}]"#,
            expect![[r#"
            "ips" of host 0: a number is not a string
            "ips" is a list of addresses, such as ["10.0.0.1"]; the port is not part of it"#]],
        ),
        (
            r#"[{"ssh":"a","ips":["--help"]}]"#,
            expect![[r#"
            "ips" of host 0: "--help" starts with '-' and would be taken for an option
            "ips" is a list of addresses, such as ["10.0.0.1"]; the port is not part of it"#]],
        ),
        (
            r#"[{"ssh":"a","ips":["10.0.0.1:5000"]}]"#,
            expect![[r#"
            "ips" of host 0: "10.0.0.1:5000" has a port
            "ips" is a list of addresses, such as ["10.0.0.1"]; the port is not part of it"#]],
        ),
        (
            r#"[{"ssh":"a","rdma":"rdma_en2"}]"#,
            expect![[r#"
            "rdma" of host 0: it is a string, not a list
            "rdma" is a list with an entry for each host: null for itself, else a device such as "rdma_en2" or a list of devices"#]],
        ),
        (
            r#"[{"ssh":"a","rdma":[null,5]}]"#,
            expect![[r#"
            "rdma" of host 0, entry 1: a number is not null, a device name or a list of device names
            "rdma" is a list with an entry for each host: null for itself, else a device such as "rdma_en2" or a list of devices"#]],
        ),
        (
            r#"[{"ssh":"a","rdma":[null,"rdma en2"]}]"#,
            expect![[r#"
            "rdma" of host 0, entry 1: "rdma en2" is not a device name: it has a character other than letters, digits, '_', '.' and '-'
            "rdma" is a list with an entry for each host: null for itself, else a device such as "rdma_en2" or a list of devices"#]],
        ),
        (
            r#"[{"ssh":"a","rdma":[null,"rdma_en2"]},{"ssh":"b"}]"#,
            expect![[r#"
            host 1 (b) has no "rdma", but other hosts have
            give every host its "rdma", or remove it from all to train over TCP"#]],
        ),
        (
            r#"[{"ssh":"a","rdma":[null,"x"]},{"ssh":"b","rdma":[null]}]"#,
            expect![[r#"
            "rdma" of the hosts: row 1 of the device matrix has 1 cells, but there are 2 rows
            a device matrix has a row for each rank and in it a cell for each rank, such as [[null, "rdma_en5"], ["rdma_en5", null]]"#]],
        ),
        (
            r#"[{"ssh":"a","rdma":[null,"x"]},{"ssh":"b","rdma":["x","x"]}]"#,
            expect![[r#"
            "rdma" of the hosts: row 1, column 1 of the device matrix is not null, but a rank has no cable to itself
            write null on the diagonal"#]],
        ),
    ]);
}

#[test]
fn forms_that_people_write() {
    let mark = Hostfile::parse("\u{feff}[{\"ssh\":\"a\"}]").unwrap();
    assert_eq!(mark.hosts[0].ssh, "a");
    for (text, expected) in [
        ("mini-1 slots=8\nmini-2 slots=8 # the other\n", r#"[{"ssh":"mini-1"}, {"ssh":"mini-2"}]"#),
        ("mini-1\nme@mini-2:4\n\n", r#"[{"ssh":"mini-1"}, {"ssh":"me@mini-2"}]"#),
        ("10.0.0.1\nfd00::2 slots=1 max-slots=2", r#"[{"ssh":"10.0.0.1"}, {"ssh":"fd00::2"}]"#),
        ("mini-1:4, mini-2:4\n", r#"[{"ssh":"mini-1"}, {"ssh":"mini-2"}]"#),
        ("gpu[01-03,07]\nlogin1", r#"[{"ssh": "gpu01"}, …], with one rank per host"#),
    ] {
        let error = Hostfile::parse(text).expect_err(text);
        assert!(error.to_string().contains("a plain list of 2 names, not MLX's JSON"), "{error}");
        assert!(error.hints()[0].ends_with(expected), "{:?}", error.hints());
    }
    for (text, says) in [
        (r#"[{"ssh":"a","ips":["[fd77::1]"]}]"#, r#""[fd77::1]": write it without brackets, "fd77::1""#),
        (r#"[{"ssh":"a","ips":["[fd77::1]:5000"]}]"#, "has a port"),
        (r#"[{"ssh":"me@a:22"}]"#, "\"me@a:22\" has a port, which belongs in ~/.ssh/config"),
        ("hosts:\n  - ssh: a\n", "is not JSON"),
        ("[\n // minis\n {\"ssh\":\"a\"}]", "is not JSON"),
    ] {
        let error = Hostfile::parse(text).expect_err(text).to_string();
        assert!(error.contains(says), "{text}: {error}");
    }
    assert!(Hostfile::parse(r#"[{"ssh":"ssh://me@a:22"},{"ssh":"me@fd00::1"}]"#).is_ok());
    let odd = Hostfile::parse(r#"[{"ssh":"a","port":2222}]"#).unwrap();
    assert!(odd.notices[0].contains("\"port\" of host 0"), "{:?}", odd.notices);
}

#[test]
fn a_first_host_that_others_would_look_for_in_themselves() {
    let lost = |text: &str| Hostfile::parse(text).unwrap().lost_coordinator().map(str::to_owned);
    for (first, address) in [
        (r#"{"ssh":"localhost","ips":["127.0.0.1"]}"#, "127.0.0.1"),
        (r#"{"ssh":"localhost","ips":["localhost"]}"#, "localhost"),
        (r#"{"ssh":"a","ips":["::1"]}"#, "::1"),
        (r#"{"ssh":"a","ips":["0.0.0.0"]}"#, "0.0.0.0"),
        (r#"{"ssh":"me@localhost"}"#, "localhost"),
        (r#"{"ssh":"a","ips":["127.0.1.1","127.0.0.1"]}"#, "127.0.1.1"),
    ] {
        for other in [r#"{"ssh":"b","ips":["10.0.0.2"]}"#, r#"{"ssh":"b"}"#] {
            assert_eq!(lost(&format!("[{first},{other}]")).as_deref(), Some(address), "{first} {other}");
        }
        // All on one machine, and one alone.
        assert_eq!(lost(&format!(r#"[{first},{{"ssh":"127.0.0.1","ips":["127.0.0.1"]}}]"#)), None);
        assert_eq!(lost(&format!("[{first}]")), None);
    }
    assert_eq!(lost(r#"[{"ssh":"a","ips":["127.0.0.1","10.0.0.1"]},{"ssh":"b"}]"#), None);
    let file = Hostfile::parse(r#"[{"ssh":"a","ips":["127.0.0.1","10.0.0.1"]},{"ssh":"b"}]"#).unwrap();
    assert_eq!(file.coordinator(), Some("10.0.0.1"));
}

/// One rule for all commands: see [`crate::is_this_host`].
#[test]
fn hosts_that_are_this_one() {
    let text = r#"[{"ssh":"::1","ips":["127.0.0.1"]},{"ssh":"localhost"},{"ssh":"127.0.0.2"},{"ssh":"me@localhost"},
                   {"ssh":"no-such-host.invalid"}]"#;
    let file = Hostfile::parse(text).unwrap();
    let here: Vec<bool> = file.hosts.iter().map(|host| crate::is_this_host(&host.ssh)).collect();
    assert_eq!(here, [true, true, true, false, false]);
    assert_eq!(file.lost_coordinator(), Some("127.0.0.1"));
}

#[test]
fn limits() {
    let hosts = |count: usize, host: &str| format!("[{}]", vec![host; count].join(","));
    let names = |count: usize| format!(r#"["{}"]"#, vec!["a"; count].join(r#"",""#));
    let cases = [
        (" ".repeat(MAX_HOSTFILE_BYTES + 1), "1048577 bytes are too long for a hostfile, the limit is 1048576"),
        (hosts(1025, r#"{"ssh":"a"}"#), r#""hosts" of the hostfile: 1025 hosts, the limit is 1024"#),
        (format!(r#"[{{"ssh":"a","ips":{}}}]"#, names(257)), r#""ips" of host 0: 257 entries, the limit is 256"#),
        (
            format!(r#"{{"envs":{},"hosts":[{{"ssh":"a"}}]}}"#, names(257)),
            r#""envs" of the hostfile: 257 entries, the limit is 256"#,
        ),
        (
            format!(r#"[{{"ssh":"a","rdma":[null,{}]}}]"#, names(17)),
            r#""rdma" of host 0, entry 1: it has 17 device names, the limit is 16"#,
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(Hostfile::parse(&text).unwrap_err().to_string(), expected);
    }
    assert!(Hostfile::parse(&format!(r#"[{{"ssh":"{}"}}]"#, "a".repeat(320))).is_ok());
    let message = Hostfile::parse(&format!(r#"[{{"ssh":"{}"}}]"#, "a".repeat(100_000))).unwrap_err().to_string();
    assert!(message.len() < 300, "{message}");
    assert_eq!(Hostfile::parse(&hosts(1024, r#"{"ssh":"a"}"#)).unwrap().hosts.len(), 1024);
    assert!(Hostfile::parse(&"[".repeat(100_000)).is_err());
}

#[test]
fn files() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("hosts.json");
    let message = |error: HostfileError| error.to_string().replace(&path.display().to_string(), "hosts.json");
    expect!["the hostfile hosts.json cannot be read: No such file or directory (os error 2)"]
        .assert_eq(&message(Hostfile::load(&path).unwrap_err()));
    let write = |text: &str| {
        let mut file = File::options().create(true).truncate(true).write(true).open(&path).unwrap();
        std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    };
    write(r#"[{"ssh":""}]"#);
    let error = Hostfile::load(&path).unwrap_err();
    assert!(error.hints()[0].contains("~/.ssh/config"));
    expect![[r#"hosts.json: "ssh" of host 0: "" is empty"#]].assert_eq(&message(error));
    write(r#"[{"ssh":"a"}]"#);
    assert_eq!(Hostfile::load(&path).unwrap().hosts[0].ssh, "a");
    File::options().write(true).open(&path).unwrap().set_len(5 << 20).unwrap();
    expect!["hosts.json: 1048577 bytes are too long for a hostfile, the limit is 1048576"]
        .assert_eq(&message(Hostfile::load(&path).unwrap_err()));
}

#[test]
fn damaged_text_never_panics() {
    for text in [JACCL, BARE] {
        for position in (0..text.len()).filter(|&position| text.is_char_boundary(position)) {
            let _ = Hostfile::parse(&text[..position]);
            for byte in ["[", "]", "{", ",", "\"", "0", "n", "\\", "\u{fffd}"] {
                let damaged = format!("{}{byte}{}", &text[..position], &text[position + 1..]);
                let _ = Hostfile::parse(&damaged).map(|hostfile| hostfile.devices().map(|_| hostfile.to_json()));
            }
        }
    }
}
