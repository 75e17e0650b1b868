//! What becomes of a launcher's variables, and what a worker reads of them.

use super::*;
use crate::launchers::{HostPort, Launcher};

const TOKEN: &str = "0123456789abcdef";

fn environment(rank: usize, local_world: usize, host: &str) -> Environment {
    Environment {
        rank,
        world: 4,
        local_rank: 0,
        local_world,
        rendezvous: Some(HostPort { host: host.to_owned(), port: 5000 }),
        launcher: Launcher::Slurm,
        devices: None,
        hosts: None,
        prefer_ring: true,
        job: Some("77".to_owned()),
        note: None,
    }
}

#[test]
fn the_rendezvous_of_a_launcher() {
    for (rank, local_world, host, token, expected) in [
        (0, 4, "gpu01", false, "127.0.0.1:5000"),
        (0, 4, "gpu01", true, "gpu01:5000"),
        (1, 2, "fd00::1", true, "[fd00::1]:5000"),
        (1, 2, "127.0.0.1", false, "127.0.0.1:5000"),
        (0, 2, "0.0.0.0", true, "0.0.0.0:5000"),
        (1, 2, "0.0.0.0", true, "MASTER_ADDR=0.0.0.0 is no address"),
        (1, 2, "gpu01", false, "have no token"),
    ] {
        let token = token.then(|| TOKEN.to_owned());
        match Membership::from_environment(environment(rank, local_world, host), token) {
            Ok(found) => assert_eq!(found.rendezvous, expected, "rank {rank} at {host}"),
            Err(error) => {
                assert!(error.to_string().contains(expected), "rank {rank} at {host}: {error}");
                assert!(!error.hints().is_empty(), "{error}");
            }
        }
    }
}

#[test]
fn a_configuration_has_what_the_membership_says() {
    let membership = Membership::from_environment(environment(1, 2, "gpu01"), Some(TOKEN.to_owned())).unwrap();
    let config = membership.config().unwrap();
    assert_eq!((config.rank, config.world, config.run.as_str()), (1, 4, "77"));
    assert_eq!((config.rendezvous.as_str(), config.started_by.as_str()), ("gpu01:5000", "srun"));
    assert_eq!((config.topology, config.join_timeout), (Some(Algorithm::Ring), JOIN_TIMEOUT));
    assert!(config.everywhere);
    let launched = Membership { launched: true, local_world: 4, ..membership.clone() }.config().unwrap();
    assert_eq!((launched.everywhere, launched.join_timeout), (false, LAUNCHED_JOIN_TIMEOUT));
    let short = Membership { token: Some("short".to_owned()), ..membership };
    assert!(matches!(short.config(), Err(MembershipError::ShortToken { length: 5, .. })));
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a file of the test")]
fn a_token_is_read_as_editors_leave_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    let long = "x".repeat(1 << 20);
    for (text, expected) in [
        ("0123456789abcdef\n", Ok(TOKEN)),
        ("\u{feff}  0123456789abcdef\r\n", Ok(TOKEN)),
        ("", Err("is too short: 0 of at least 16")),
        ("secret\n", Err("is too short: 6 of at least 16")),
        (long.as_str(), Err("too long for a token")),
    ] {
        std::fs::write(&file, text).unwrap();
        match (token::read(&file), expected) {
            (Ok(token), Ok(expected)) => assert_eq!(token, expected),
            (Err(error), Err(says)) => {
                let told = error.to_string();
                assert!(told.contains(says) && told.contains(&file.display().to_string()), "{told}");
                assert!(!error.hints().is_empty(), "{told}");
            }
            (found, expected) => panic!("{found:?} instead of {expected:?}"),
        }
    }
    // A file without an end.
    assert!(matches!(token::read(Path::new("/dev/zero")), Err(MembershipError::TokenFile { .. })));
}

/// The line that a worker reads: the names are those of every version.
#[test]
fn a_membership_travels_as_json() {
    let devices = DeviceMatrix::parse(r#"[[null,"rdma_en5"],["rdma_en5",null]]"#).unwrap();
    let membership = Membership { world: 2, devices: Some(devices), launched: true, ..Membership::alone() };
    let text = serde_json::to_string(&membership).unwrap();
    assert_eq!(
        text,
        r#"{"rank":0,"world":2,"local_rank":0,"local_world":1,"rendezvous":"","addresses":[],"run":"","token":null,"devices":[[null,"rdma_en5"],["rdma_en5",null]],"prefer_ring":false,"started_by":"","launched":true}"#
    );
    assert_eq!(serde_json::from_str::<Membership>(&text).unwrap(), membership);
}
