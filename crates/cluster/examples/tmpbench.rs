use finetune_allreduce::*;
use finetune_cluster::bench::*;
fn main() {
    let var = |n: &str| std::env::var(n).ok();
    let rank: usize = var("RANK").unwrap().parse().unwrap();
    let world: usize = var("WORLD_SIZE").unwrap().parse().unwrap();
    let mut config = Config::new(rank, world, format!("127.0.0.1:{}", var("MASTER_PORT").unwrap()), Secret::loopback());
    if rank == 0 {
        config.notices = std::sync::Arc::new(|n| eprintln!("{n}"));
    }
    if let Some(us) = var("SPIN") {
        config.tcp.busy_poll = Some(std::time::Duration::from_micros(us.parse().unwrap()));
    }
    if let Some(f) = var("FRAME") {
        config.tcp.frame_bytes = f.parse().unwrap();
    }
    if let Some(f) = var("BUF") {
        config.tcp.buffer_bytes = Some(f.parse().unwrap());
    }
    if let Some(f) = var("STREAMS") {
        config.tcp.streams = f.parse().unwrap();
    }
    let topology = match var("TOPO").as_deref() {
        Some("ring") => Some(Algorithm::Ring),
        Some("mesh") => Some(Algorithm::Mesh),
        Some("direct") => Some(Algorithm::Direct),
        _ => None,
    };
    let group = Group::join(&config).unwrap();
    let options = Options {
        operation: Operation::AllReduce,
        min_bytes: var("MIN").map_or(1024, |v| v.parse().unwrap()),
        max_bytes: var("MAX").map_or(64 << 20, |v| v.parse().unwrap()),
        step: 4,
        wire: Wire::Exact,
        topology,
    };
    run(&group, &options, &mut |r| {
        if rank == 0 {
            println!(
                "{:>9} {:8} {:>10.1} {:>10.1} {:>8.3} wrong {}",
                r.bytes, r.topology, r.latency_us_median, r.latency_us_min, r.algbw_gb_s, r.wrong
            );
        }
    })
    .unwrap();
}
