// How two ranks that share a key meet over TCP, while strangers may connect too.
//
//   who listens    a challenge of 32 random bytes
//   who connects   a nonce of 32 random bytes, and the proof HMAC(key, "gloo connect", challenge, nonce, address)
//   who listens    the proof HMAC(key, "gloo accept", challenge, nonce)
//
// The address is the one at which it listens: a proof that is passed on to another rank is worth nothing there. From then on the
// connection is theirs, but who can change packets between them can change what they say.
#pragma once

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <deque>
#include <string>
#include <thread>
#include <vector>

#include "gloo/common/error.h"
#include "gloo/common/logging.h"
#include "gloo/common/sha256.h"

namespace gloo {
namespace transport {
namespace tcp {
namespace introduction {

using Clock = std::chrono::steady_clock;

constexpr size_t kMostStrangers = 64; // that may wait at a time: the oldest gives way to a new one
constexpr size_t kMostAtOnce = 16; // that are taken in before the others are listened to again
constexpr auto kPatience = std::chrono::seconds(10); // with a stranger

inline Digest randomBytes() {
  Digest bytes;
  for (size_t filled = 0; filled < bytes.size();) {
    const auto rv = getrandom(bytes.data() + filled, bytes.size() - filled, 0);
    GLOO_ENFORCE(rv > 0 || errno == EINTR, "getrandom: ", strerror(errno));
    if (rv > 0) {
      filled += rv;
    }
  }
  return bytes;
}

inline Digest proofOfConnecting(
    const std::string& key, const Digest& challenge, const Digest& nonce, const std::string& address) {
  Hmac hmac(key);
  hmac.add("gloo connect").add(challenge.data(), challenge.size()).add(nonce.data(), nonce.size()).add(address);
  return hmac.finish();
}

inline Digest proofOfAccepting(const std::string& key, const Digest& challenge, const Digest& nonce) {
  Hmac hmac(key);
  hmac.add("gloo accept").add(challenge.data(), challenge.size()).add(nonce.data(), nonce.size());
  return hmac.finish();
}

// An open descriptor, closed with the object unless it is given away.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) : fd_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Descriptor() {
    if (fd_ != -1) {
      ::close(fd_);
    }
  }

  int get() const { return fd_; }
  int release() {
    const int fd = fd_;
    fd_ = -1;
    return fd;
  }

 private:
  int fd_;
};

// Who has connected and has not proven anything yet.
struct Stranger {
  explicit Stranger(int fd) : connection(fd), challenge(randomBytes()), since(Clock::now()) {}

  Descriptor connection;
  Digest challenge;
  std::array<uint8_t, 64> answer; // nonce and proof
  size_t received = 0;
  Clock::time_point since;
};

inline int millisecondsUntil(Clock::time_point when) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(when - Clock::now()).count();
  return static_cast<int>(std::min<int64_t>(std::max<int64_t>(left + 1, 0), 1000 * 1000));
}

// These few bytes always fit into the buffer of a new connection. That it is gone, the next look at it finds out.
inline void sendAll(int fd, const void* data, size_t size) {
  (void)!::send(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
}

// Takes in who waits at `listener`.
inline void acceptStrangers(int listener, std::deque<Stranger>& strangers) {
  for (size_t taken = 0; taken < kMostAtOnce; taken++) {
    const int fd = accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd == -1) {
      if (errno == EINTR || errno == ECONNABORTED) {
        continue;
      }
      if (errno == EMFILE || errno == ENFILE) {
        if (strangers.empty()) {
          std::this_thread::sleep_for(std::chrono::milliseconds(10));
        } else {
          strangers.pop_front();
        }
      }
      return; // none is left, or this one had gone
    }
    if (strangers.size() == kMostStrangers) {
      strangers.pop_front();
    }
    strangers.emplace_back(fd);
    const auto& challenge = strangers.back().challenge;
    sendAll(fd, challenge.data(), challenge.size());
  }
}

enum class Heard { Nothing, Wrong, Proof };

inline Heard listenTo(Stranger& stranger, const std::string& key, const std::string& address) {
  auto& answer = stranger.answer;
  const auto rv = ::recv(
      stranger.connection.get(), answer.data() + stranger.received, answer.size() - stranger.received, MSG_DONTWAIT);
  if (rv <= 0) {
    return rv == -1 && (errno == EAGAIN || errno == EINTR) ? Heard::Nothing : Heard::Wrong;
  }
  stranger.received += rv;
  if (stranger.received < answer.size()) {
    return Heard::Nothing;
  }
  Digest nonce;
  std::copy_n(answer.begin(), nonce.size(), nonce.begin());
  const auto proof = proofOfConnecting(key, stranger.challenge, nonce, address);
  if (!isSame(proof.data(), answer.data() + nonce.size(), proof.size())) {
    return Heard::Wrong;
  }
  const auto own = proofOfAccepting(key, stranger.challenge, nonce);
  sendAll(stranger.connection.get(), own.data(), own.size());
  return Heard::Proof;
}

// The connection of the first who proves to know the key; -1 when none has by the deadline. `listener` must not block.
inline int acceptMember(
    int listener, const std::string& key, const std::string& address, Clock::time_point deadline) {
  std::deque<Stranger> strangers;
  for (;;) {
    const auto now = Clock::now();
    if (now >= deadline) {
      return -1;
    }
    while (!strangers.empty() && now - strangers.front().since >= kPatience) {
      strangers.pop_front();
    }
    std::vector<struct pollfd> polled{{listener, POLLIN, 0}};
    for (const auto& stranger : strangers) {
      polled.push_back({stranger.connection.get(), POLLIN, 0});
    }
    const auto next = strangers.empty() ? deadline : std::min(deadline, strangers.front().since + kPatience);
    const int rv = ::poll(polled.data(), polled.size(), millisecondsUntil(next));
    GLOO_ENFORCE(rv >= 0 || errno == EINTR, "poll: ", strerror(errno));
    if (rv <= 0) {
      continue;
    }
    for (size_t i = polled.size() - 1; i > 0; i--) {
      if (polled[i].revents == 0) {
        continue;
      }
      auto& stranger = strangers[i - 1];
      switch (listenTo(stranger, key, address)) {
        case Heard::Proof:
          return stranger.connection.release();
        case Heard::Wrong:
          strangers.erase(strangers.begin() + (i - 1));
          break;
        case Heard::Nothing:
          break;
      }
    }
    if (polled[0].revents != 0) {
      acceptStrangers(listener, strangers);
    }
  }
}

// Fills `data` from a connection; false when it was closed or the deadline passed.
inline bool receiveAll(int fd, void* data, size_t size, Clock::time_point deadline) {
  auto bytes = static_cast<uint8_t*>(data);
  while (size > 0) {
    struct pollfd polled = {fd, POLLIN, 0};
    const int ready = ::poll(&polled, 1, millisecondsUntil(deadline));
    if (ready == 0 || (ready == -1 && errno != EINTR)) {
      return false;
    }
    const auto rv = ready > 0 ? ::recv(fd, bytes, size, MSG_DONTWAIT) : 0;
    if (ready > 0 && (rv == 0 || (rv == -1 && errno != EAGAIN && errno != EINTR))) {
      return false;
    }
    if (rv > 0) {
      bytes += rv;
      size -= rv;
    }
  }
  return true;
}

// Connects, or gives the error: ETIMEDOUT after the deadline.
inline int connectBy(int fd, const struct sockaddr* address, socklen_t size, Clock::time_point deadline) {
  if (::connect(fd, address, size) == 0) {
    return 0;
  }
  if (errno != EINPROGRESS) {
    return errno;
  }
  struct pollfd polled = {fd, POLLOUT, 0};
  for (;;) {
    const int ready = ::poll(&polled, 1, millisecondsUntil(deadline));
    if (ready == 0) {
      return ETIMEDOUT;
    }
    if (ready > 0) {
      int error = 0;
      socklen_t length = sizeof(error);
      return getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) == -1 ? errno : error;
    }
    if (errno != EINTR) {
      return errno;
    }
  }
}

// A connection to who listens at `peer` (written `name`) and has proven to know the key. Where many connect at once, one may be
// let go before it was heard: then it is tried again.
//
// Throws IoException where nobody listens, or not who should, and after the deadline.
inline int connectToMember(
    const struct sockaddr* peer,
    socklen_t size,
    const std::string& key,
    const std::string& name,
    Clock::time_point deadline) {
  while (Clock::now() < deadline) {
    Descriptor connection(socket(peer->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (connection.get() == -1) {
      GLOO_THROW_IO_EXCEPTION("socket: ", strerror(errno));
    }
    const int error = connectBy(connection.get(), peer, size, deadline);
    if (error != 0) {
      GLOO_THROW_IO_EXCEPTION("connect ", name, ": ", strerror(error));
    }
    Digest challenge, proof;
    if (receiveAll(connection.get(), challenge.data(), challenge.size(), deadline)) {
      const auto nonce = randomBytes();
      const auto own = proofOfConnecting(key, challenge, nonce, name);
      std::array<uint8_t, 64> answer;
      std::copy(own.begin(), own.end(), std::copy(nonce.begin(), nonce.end(), answer.begin()));
      sendAll(connection.get(), answer.data(), answer.size());
      if (receiveAll(connection.get(), proof.data(), proof.size(), deadline)) {
        const auto expected = proofOfAccepting(key, challenge, nonce);
        if (!isSame(expected.data(), proof.data(), proof.size())) {
          GLOO_THROW_IO_EXCEPTION("connect ", name, ": who listens there does not know the job's key");
        }
        return connection.release();
      }
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  GLOO_THROW_IO_EXCEPTION("connect ", name, ": no answer in time");
}

} // namespace introduction
} // namespace tcp
} // namespace transport
} // namespace gloo
