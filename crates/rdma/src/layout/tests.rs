//! Compares `layout.rs` with the C header of the machine the test runs on.

use std::io::Write;
use std::mem::{offset_of, size_of};
use std::process::{Command, Stdio};

use super::*;

/// C expressions and the values that they have here.
fn expectations() -> Vec<(String, u64)> {
    let mut expected: Vec<(String, u64)> = Vec::new();
    macro_rules! sizes {
        ($($c:literal = $rust:ty),* $(,)?) => {
            $(expected.push((concat!("sizeof(struct ", $c, ")").into(), size_of::<$rust>() as u64));)*
        };
    }
    macro_rules! offsets {
        ($($c:literal = $rust:ty { $($field:ident),* })*) => {
            $($(expected.push((
                concat!("offsetof(struct ", $c, ", ", stringify!($field), ")").into(),
                offset_of!($rust, $field) as u64,
            ));)*)*
        };
    }
    macro_rules! numbers {
        ($($c:ident = $rust:expr),* $(,)?) => { $(expected.push((stringify!($c).into(), $rust as u64));)* };
    }
    sizes! {
        "ibv_context_ops" = ContextOps, "ibv_qp_cap" = QpCap, "ibv_qp_init_attr" = QpInitAttr,
        "ibv_global_route" = GlobalRoute, "ibv_ah_attr" = AddressAttr, "ibv_qp_attr" = QpAttr, "ibv_sge" = ScatterGather,
        "ibv_send_wr" = SendRequest, "ibv_recv_wr" = ReceiveRequest, "ibv_wc" = WorkCompletion, "ibv_mr" = Mr,
    }
    expected.push(("sizeof(union ibv_gid)".into(), size_of::<Gid>() as u64));
    offsets! {
        "ibv_context" = Context { device, ops }
        "ibv_context_ops" = ContextOps { poll_cq, post_send, post_recv }
        "ibv_qp" = Qp { context, qp_context, pd, send_cq, recv_cq, srq, handle, qp_num }
        "ibv_mr" = Mr { context, pd, addr, length, handle, lkey, rkey }
        "ibv_port_attr" = PortAttr { state, max_mtu, active_mtu, gid_tbl_len, max_msg_sz, lid }
        "ibv_device_attr" = DeviceAttr { fw_ver, max_mr_size, max_qp, max_qp_wr, max_sge, max_cq, max_cqe, max_mr, max_pd }
        "ibv_qp_cap" = QpCap { max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data }
        "ibv_qp_init_attr" = QpInitAttr { qp_context, send_cq, recv_cq, srq, cap, qp_type, sq_sig_all }
        "ibv_global_route" = GlobalRoute { dgid, flow_label, sgid_index, hop_limit, traffic_class }
        "ibv_ah_attr" = AddressAttr { grh, dlid, sl, src_path_bits, static_rate, is_global, port_num }
        "ibv_qp_attr" = QpAttr {
            qp_state, cur_qp_state, path_mtu, path_mig_state, qkey, rq_psn, sq_psn, dest_qp_num, qp_access_flags, cap,
            ah_attr, alt_ah_attr, pkey_index, max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num, timeout,
            retry_cnt, rnr_retry, rate_limit
        }
        "ibv_sge" = ScatterGather { addr, length, lkey }
        "ibv_send_wr" = SendRequest { wr_id, next, sg_list, num_sge, opcode, send_flags, imm_data }
        "ibv_recv_wr" = ReceiveRequest { wr_id, next, sg_list, num_sge }
        "ibv_wc" = WorkCompletion { wr_id, status, opcode, vendor_err, byte_len, qp_num }
    }
    numbers! {
        IBV_QPT_RC = QPT_RC, IBV_QPT_UC = QPT_UC,
        IBV_QPS_INIT = QPS_INIT, IBV_QPS_RTR = QPS_RTR, IBV_QPS_RTS = QPS_RTS, IBV_QPS_ERR = QPS_ERR,
        IBV_QP_STATE = QP_STATE, IBV_QP_ACCESS_FLAGS = QP_ACCESS_FLAGS, IBV_QP_PKEY_INDEX = QP_PKEY_INDEX,
        IBV_QP_PORT = QP_PORT, IBV_QP_AV = QP_AV, IBV_QP_PATH_MTU = QP_PATH_MTU, IBV_QP_TIMEOUT = QP_TIMEOUT,
        IBV_QP_RETRY_CNT = QP_RETRY_CNT, IBV_QP_RNR_RETRY = QP_RNR_RETRY, IBV_QP_RQ_PSN = QP_RQ_PSN,
        IBV_QP_MAX_QP_RD_ATOMIC = QP_MAX_QP_RD_ATOMIC, IBV_QP_MIN_RNR_TIMER = QP_MIN_RNR_TIMER,
        IBV_QP_SQ_PSN = QP_SQ_PSN, IBV_QP_MAX_DEST_RD_ATOMIC = QP_MAX_DEST_RD_ATOMIC, IBV_QP_CAP = QP_CAP,
        IBV_QP_DEST_QPN = QP_DEST_QPN, IBV_ACCESS_LOCAL_WRITE = ACCESS_LOCAL_WRITE, IBV_PORT_ACTIVE = PORT_ACTIVE,
        IBV_MTU_256 = 1, IBV_MTU_4096 = MTU_4096, IBV_WC_SUCCESS = WC_SUCCESS,
        IBV_WC_RETRY_EXC_ERR = WC_RETRY_EXC_ERR, IBV_WC_GENERAL_ERR = 21,
        IBV_WR_SEND = platform::WR_SEND, IBV_SEND_SIGNALED = platform::SEND_SIGNALED,
    }
    expected
}

#[test]
fn layouts_and_numbers_are_those_of_the_c_header() {
    let expected = expectations();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = folder.path().join("layout");
    let mut source = String::from(
        "#include <infiniband/verbs.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n\
         printf(\"%zu %zu\\n\", sizeof(struct ibv_port_attr), sizeof(struct ibv_device_attr));\n",
    );
    for (expression, _) in &expected {
        source += &format!("printf(\"%llu\\n\", (unsigned long long)({expression}));\n");
    }
    source += "return 0;}\n";
    let compiler = Command::new("cc")
        .args(["-x", "c", "-", "-o"])
        .arg(&program)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut compiler) = compiler else {
        println!("SKIPPED: no C compiler (cc), so the verbs structures are not compared with the header");
        return;
    };
    compiler.stdin.take().expect("piped").write_all(source.as_bytes()).expect("the compiler reads");
    let output = compiler.wait_with_output().expect("the compiler ends");
    let errors = String::from_utf8_lossy(&output.stderr);
    if errors.contains("infiniband/verbs.h") {
        println!(
            "SKIPPED: no <infiniband/verbs.h> (libibverbs-dev, or a macOS SDK from 26.2): structures not compared"
        );
        return;
    }
    assert!(output.status.success(), "{errors}");
    let output = Command::new(&program).output().expect("the program runs").stdout;
    let output = String::from_utf8(output).expect("numbers");
    let mut lines = output.lines();
    let sizes: Vec<usize> = lines.next().expect("sizes").split(' ').map(|size| size.parse().expect("a size")).collect();
    assert!(sizes[0] <= size_of::<PortAttr>() && sizes[1] <= size_of::<DeviceAttr>(), "longer in C: {sizes:?}");
    let found: Vec<u64> = lines.map(|line| line.parse().expect("a number")).collect();
    assert_eq!(found.len(), expected.len());
    let wrong: Vec<String> = (expected.iter().zip(&found))
        .filter(|((_, expected), found)| expected != *found)
        .map(|((expression, expected), found)| format!("{expression} is {found}, here {expected}"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("{} sizes, offsets and numbers agree with <infiniband/verbs.h>", expected.len());
}
