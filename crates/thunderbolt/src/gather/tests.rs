//! Gathering on this machine, and from hosts that do not answer.

use finetune_advice::Advice as _;
use finetune_launch::gather::run_command;

use super::*;
use crate::facts::System;

#[test]
fn this_machine() {
    let facts = gather(&["localhost".into()], &Questions::default(), DEADLINE).remove(0).unwrap();
    assert!(matches!(facts.system, System::Linux | System::Mac), "{:?}", facts.system);
    assert!(facts.complete, "{facts:#?}");
    let clock = facts.clock.expect("date works");
    assert!(clock.ahead.abs() < 2.5, "{clock:?}");
    assert!(
        facts.interfaces.iter().any(|interface| interface.addresses.iter().any(|(address, _)| address.is_loopback()))
    );
    assert!(facts.disk_free_bytes.is_some() && facts.memory_bytes.is_some(), "{facts:#?}");
}

#[test]
fn names_that_are_options_never_reach_ssh() {
    let error = gather(&["-oProxyCommand=true".into()], &Questions::default(), DEADLINE).remove(0).unwrap_err();
    assert!(error.to_string().contains("taken for an option"), "{error}");
}

#[test]
fn an_unknown_host_is_named_with_sshs_words() {
    let hosts = ["localhost".to_owned(), "no-such-host.invalid".to_owned()];
    let answers = gather(&hosts, &Questions::default(), DEADLINE);
    assert!(answers[0].is_ok());
    match answers[1].as_ref().unwrap_err() {
        error @ GatherError::Unreachable { .. } => {
            assert!(error.to_string().starts_with("no-such-host.invalid is not reachable: "), "{error}");
            assert_eq!(error.hints().len(), 1);
        }
        // A machine without ssh.
        GatherError::Start { program: "ssh", .. } => {}
        other => panic!("{other}"),
    }
}

/// `FINETUNE_SSH_HOST=name cargo test … over_ssh -- --ignored --nocapture`: everything that is
/// found out about a real host.
#[test]
#[ignore = "needs a host that ssh reaches"]
fn over_ssh() {
    let host = std::env::var("FINETUNE_SSH_HOST").expect("FINETUNE_SSH_HOST is set");
    let questions = Questions { root: true, ..Questions::default() };
    let facts = gather(std::slice::from_ref(&host), &questions, DEADLINE).remove(0);
    println!("{facts:#?}");
    let discovery = crate::discover::Discovery::new(vec![facts]);
    println!("{}", crate::diagram::text(&discovery));
    println!("{}", crate::doctor::text(&crate::doctor::examine(&discovery, &crate::doctor::Expected::default()), true));
    println!("{:?}", run_command(&host, "echo \"it's $((1+1))\"; exit 4", DEADLINE));
    println!("{:?}", run_command(&host, "sleep 60", Duration::from_secs(1)));
}
