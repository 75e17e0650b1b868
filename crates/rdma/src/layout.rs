//! The C structures and numbers of the verbs interface, as in rdma-core's `infiniband/verbs.h` for
//! 64-bit machines.
//!
//! Names are those of the header in Rust's spelling. If the header's line is a union, its largest
//! member decides the size. `layout/tests.rs` has a C compiler print every size, offset and
//! number used here, and compares.
//!
//! **On macOS** the header is in the SDK (26.2 and later). What is known without a Mac: the same
//! symbols exist; `post_send`, `post_recv` and `poll_cq` go through the same table in the context
//! (MLX's JACCL compiles against that header and does this); a port that works reads ACTIVE = 4
//! (TN3205). That the numbers below are the same there is likely, since Apple took the interface
//! over, but not confirmed: one project that writes them out by hand has `SEND` = 0 and `SIGNALED`
//! = 1, in code that shows no sign of having run. On a Mac with the SDK the layout test decides;
//! the two numbers in doubt are in [`platform`]. Every queue pair also asks for a completion of
//! every send (`sq_sig_all`), so `SIGNALED` matters little.

use std::ffi::{c_char, c_int, c_void};

#[cfg(test)]
mod tests;

/// `IBV_QPT_*`.
pub(crate) const QPT_RC: u32 = 2;
pub(crate) const QPT_UC: u32 = 3;

/// `IBV_QPS_*`.
pub(crate) const QPS_INIT: u32 = 1;
pub(crate) const QPS_RTR: u32 = 2;
pub(crate) const QPS_RTS: u32 = 3;
pub(crate) const QPS_ERR: u32 = 6;

/// `IBV_QP_*`: which fields of [`QpAttr`] count.
pub(crate) const QP_STATE: c_int = 1;
pub(crate) const QP_ACCESS_FLAGS: c_int = 1 << 3;
pub(crate) const QP_PKEY_INDEX: c_int = 1 << 4;
pub(crate) const QP_PORT: c_int = 1 << 5;
pub(crate) const QP_AV: c_int = 1 << 7;
pub(crate) const QP_PATH_MTU: c_int = 1 << 8;
pub(crate) const QP_TIMEOUT: c_int = 1 << 9;
pub(crate) const QP_RETRY_CNT: c_int = 1 << 10;
pub(crate) const QP_RNR_RETRY: c_int = 1 << 11;
pub(crate) const QP_RQ_PSN: c_int = 1 << 12;
pub(crate) const QP_MAX_QP_RD_ATOMIC: c_int = 1 << 13;
pub(crate) const QP_MIN_RNR_TIMER: c_int = 1 << 15;
pub(crate) const QP_SQ_PSN: c_int = 1 << 16;
pub(crate) const QP_MAX_DEST_RD_ATOMIC: c_int = 1 << 17;
pub(crate) const QP_CAP: c_int = 1 << 19;
pub(crate) const QP_DEST_QPN: c_int = 1 << 20;

/// `IBV_ACCESS_LOCAL_WRITE`.
pub(crate) const ACCESS_LOCAL_WRITE: c_int = 1;
/// `IBV_PORT_ACTIVE`.
pub(crate) const PORT_ACTIVE: u32 = 4;
/// `IBV_MTU_4096`; each step down halves the bytes, to `IBV_MTU_256` = 1.
pub(crate) const MTU_4096: u32 = 5;

/// `IBV_WC_*`.
pub(crate) const WC_SUCCESS: u32 = 0;
pub(crate) const WC_RETRY_EXC_ERR: u32 = 12;

/// The numbers that could differ on macOS: see the top of the file.
pub(crate) mod platform {
    #[cfg(not(target_os = "macos"))]
    mod numbers {
        /// `IBV_WR_SEND`.
        pub(crate) const WR_SEND: u32 = 2;
        /// `IBV_SEND_SIGNALED`.
        pub(crate) const SEND_SIGNALED: u32 = 2;
        /// Routers that a packet may pass: RoCE v2 can be routed.
        pub(crate) const HOP_LIMIT: u8 = 64;
    }

    // Not confirmed on a Mac: rdma-core's. TN3205: Thunderbolt's RDMA is not routable; JACCL allows
    // one hop.
    #[cfg(target_os = "macos")]
    mod numbers {
        pub(crate) const WR_SEND: u32 = 2;
        pub(crate) const SEND_SIGNALED: u32 = 2;
        pub(crate) const HOP_LIMIT: u8 = 1;
    }

    pub(crate) use numbers::{HOP_LIMIT, SEND_SIGNALED, WR_SEND};
}

/// `enum ibv_wc_status` as text: what the specification says, and what it means here.
pub(crate) fn status_name(status: u32) -> &'static str {
    const NAMES: [&str; 22] = [
        "success",
        "local length error: a message is longer than the posted receive",
        "local queue pair operation error",
        "local end-to-end context error",
        "local protection error: memory that is not registered",
        "flushed: the queue pair failed before",
        "memory window bind error",
        "bad response",
        "local access error",
        "remote invalid request: the peer's receive is shorter than the message",
        "remote access error",
        "remote operation error",
        "retries exceeded: the peer does not answer",
        "receiver-not-ready retries exceeded: the peer has no receive posted",
        "local reliable datagram violation",
        "remote invalid reliable datagram request",
        "remote aborted",
        "invalid end-to-end context number",
        "invalid end-to-end context state",
        "fatal error of the device",
        "response timeout",
        "general error",
    ];
    NAMES.get(status as usize).copied().unwrap_or("unknown status")
}

/// `struct ibv_context_ops`: functions that the header calls inline, by place.
#[repr(C)]
pub(crate) struct ContextOps {
    pub(crate) before_poll_cq: [*mut c_void; 11],
    // SAFETY: these are types only; who calls such a function says why it may, in `verbs.rs`.
    pub(crate) poll_cq: Option<unsafe extern "C" fn(*mut CompletionQueue, c_int, *mut WorkCompletion) -> c_int>,
    pub(crate) before_post_send: [*mut c_void; 13],
    pub(crate) post_send: Option<unsafe extern "C" fn(*mut Qp, *mut SendRequest, *mut *mut SendRequest) -> c_int>,
    pub(crate) post_recv: Option<unsafe extern "C" fn(*mut Qp, *mut ReceiveRequest, *mut *mut ReceiveRequest) -> c_int>,
    pub(crate) after_post_recv: [*mut c_void; 5],
}

/// `struct ibv_context`, up to what is used.
#[repr(C)]
pub(crate) struct Context {
    pub(crate) device: *mut Device,
    pub(crate) ops: ContextOps,
}

/// `struct ibv_device`, seen only through a pointer.
#[repr(C)]
pub(crate) struct Device {
    opaque: [u8; 0],
}

/// `struct ibv_pd`, seen only through a pointer.
#[repr(C)]
pub(crate) struct Pd {
    opaque: [u8; 0],
}

/// `struct ibv_cq`, seen only through a pointer.
#[repr(C)]
pub(crate) struct CompletionQueue {
    opaque: [u8; 0],
}

/// `struct ibv_qp`, up to what is used.
#[repr(C)]
pub(crate) struct Qp {
    pub(crate) context: *mut Context,
    pub(crate) qp_context: *mut c_void,
    pub(crate) pd: *mut Pd,
    pub(crate) send_cq: *mut CompletionQueue,
    pub(crate) recv_cq: *mut CompletionQueue,
    pub(crate) srq: *mut c_void,
    pub(crate) handle: u32,
    pub(crate) qp_num: u32,
}

/// `struct ibv_mr`.
#[repr(C)]
pub(crate) struct Mr {
    pub(crate) context: *mut Context,
    pub(crate) pd: *mut Pd,
    pub(crate) addr: *mut c_void,
    pub(crate) length: usize,
    pub(crate) handle: u32,
    pub(crate) lkey: u32,
    pub(crate) rkey: u32,
}

/// `union ibv_gid`; the union holds 64-bit integers, hence the alignment.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Gid {
    pub(crate) raw: [u8; 16],
}

/// `struct ibv_port_attr`, longer than the header's: older and newer libraries write more or less
/// of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PortAttr {
    pub(crate) state: u32,
    pub(crate) max_mtu: u32,
    pub(crate) active_mtu: u32,
    pub(crate) gid_tbl_len: c_int,
    pub(crate) port_cap_flags: u32,
    pub(crate) max_msg_sz: u32,
    pub(crate) bad_pkey_cntr: u32,
    pub(crate) qkey_viol_cntr: u32,
    pub(crate) pkey_tbl_len: u16,
    pub(crate) lid: u16,
    pub(crate) sm_lid: u16,
    pub(crate) rest: [u32; 12],
}

/// `struct ibv_device_attr`, longer than the header's.
#[repr(C)]
pub(crate) struct DeviceAttr {
    pub(crate) fw_ver: [c_char; 64],
    pub(crate) guids: [u64; 2],
    pub(crate) max_mr_size: u64,
    pub(crate) page_size_cap: u64,
    pub(crate) vendor: [u32; 3],
    pub(crate) max_qp: c_int,
    pub(crate) max_qp_wr: c_int,
    pub(crate) device_cap_flags: u32,
    pub(crate) max_sge: c_int,
    pub(crate) max_sge_rd: c_int,
    pub(crate) max_cq: c_int,
    pub(crate) max_cqe: c_int,
    pub(crate) max_mr: c_int,
    pub(crate) max_pd: c_int,
    pub(crate) rest: [u32; 64],
}

impl Default for DeviceAttr {
    fn default() -> DeviceAttr {
        DeviceAttr {
            fw_ver: [0; 64],
            guids: [0; 2],
            max_mr_size: 0,
            page_size_cap: 0,
            vendor: [0; 3],
            max_qp: 0,
            max_qp_wr: 0,
            device_cap_flags: 0,
            max_sge: 0,
            max_sge_rd: 0,
            max_cq: 0,
            max_cqe: 0,
            max_mr: 0,
            max_pd: 0,
            rest: [0; 64],
        }
    }
}

/// `struct ibv_qp_cap`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct QpCap {
    pub(crate) max_send_wr: u32,
    pub(crate) max_recv_wr: u32,
    pub(crate) max_send_sge: u32,
    pub(crate) max_recv_sge: u32,
    pub(crate) max_inline_data: u32,
}

/// `struct ibv_qp_init_attr`.
#[repr(C)]
pub(crate) struct QpInitAttr {
    pub(crate) qp_context: *mut c_void,
    pub(crate) send_cq: *mut CompletionQueue,
    pub(crate) recv_cq: *mut CompletionQueue,
    pub(crate) srq: *mut c_void,
    pub(crate) cap: QpCap,
    pub(crate) qp_type: u32,
    pub(crate) sq_sig_all: c_int,
}

/// `struct ibv_global_route`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GlobalRoute {
    pub(crate) dgid: Gid,
    pub(crate) flow_label: u32,
    pub(crate) sgid_index: u8,
    pub(crate) hop_limit: u8,
    pub(crate) traffic_class: u8,
}

/// `struct ibv_ah_attr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AddressAttr {
    pub(crate) grh: GlobalRoute,
    pub(crate) dlid: u16,
    pub(crate) sl: u8,
    pub(crate) src_path_bits: u8,
    pub(crate) static_rate: u8,
    pub(crate) is_global: u8,
    pub(crate) port_num: u8,
}

/// `struct ibv_qp_attr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct QpAttr {
    pub(crate) qp_state: u32,
    pub(crate) cur_qp_state: u32,
    pub(crate) path_mtu: u32,
    pub(crate) path_mig_state: u32,
    pub(crate) qkey: u32,
    pub(crate) rq_psn: u32,
    pub(crate) sq_psn: u32,
    pub(crate) dest_qp_num: u32,
    pub(crate) qp_access_flags: u32,
    pub(crate) cap: QpCap,
    pub(crate) ah_attr: AddressAttr,
    pub(crate) alt_ah_attr: AddressAttr,
    pub(crate) pkey_index: u16,
    pub(crate) alt_pkey_index: u16,
    pub(crate) en_sqd_async_notify: u8,
    pub(crate) sq_draining: u8,
    pub(crate) max_rd_atomic: u8,
    pub(crate) max_dest_rd_atomic: u8,
    pub(crate) min_rnr_timer: u8,
    pub(crate) port_num: u8,
    pub(crate) timeout: u8,
    pub(crate) retry_cnt: u8,
    pub(crate) rnr_retry: u8,
    pub(crate) alt_port_num: u8,
    pub(crate) alt_timeout: u8,
    pub(crate) rate_limit: u32,
}

/// `struct ibv_sge`.
#[repr(C)]
pub(crate) struct ScatterGather {
    pub(crate) addr: u64,
    pub(crate) length: u32,
    pub(crate) lkey: u32,
}

/// `struct ibv_send_wr`.
#[repr(C)]
pub(crate) struct SendRequest {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut SendRequest,
    pub(crate) sg_list: *mut ScatterGather,
    pub(crate) num_sge: c_int,
    pub(crate) opcode: u32,
    pub(crate) send_flags: u32,
    pub(crate) imm_data: u32,
    /// The unions for other operations than SEND.
    pub(crate) unused: [u64; 11],
}

/// `struct ibv_recv_wr`.
#[repr(C)]
pub(crate) struct ReceiveRequest {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut ReceiveRequest,
    pub(crate) sg_list: *mut ScatterGather,
    pub(crate) num_sge: c_int,
}

/// `struct ibv_wc`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WorkCompletion {
    pub(crate) wr_id: u64,
    pub(crate) status: u32,
    pub(crate) opcode: u32,
    pub(crate) vendor_err: u32,
    pub(crate) byte_len: u32,
    pub(crate) imm_data: u32,
    pub(crate) qp_num: u32,
    pub(crate) src_qp: u32,
    pub(crate) wc_flags: u32,
    pub(crate) pkey_index: u16,
    pub(crate) slid: u16,
    pub(crate) sl: u8,
    pub(crate) dlid_path_bits: u8,
}
