//! A hostfile: it is refused with hints, or what it is written as reads back to the same hosts.
#![no_main]

use finetune_advice::Advice as _;
use finetune_rendezvous::Hostfile;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| match Hostfile::parse(text) {
    Ok(hostfile) => {
        let _ = (hostfile.devices(), hostfile.coordinator(), hostfile.lost_coordinator());
        assert_eq!(Hostfile::parse(&hostfile.to_json()).expect("a written hostfile").hosts, hostfile.hosts);
    }
    Err(error) => drop((error.to_string(), error.hints())),
});
